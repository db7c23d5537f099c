"""Nemotron and the first Minitron models: squared ReLU, LayerNorm with 1 + weight, partial rotary embeddings."""

from nemo_minitron.families.family import Family

FAMILY = Family(
    name="nemotron",
    architecture="NemotronForCausalLM",
    defaults={
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 4096,
    },
    must_be_off=("attention_bias", "mlp_bias"),
    norm="layernorm1p",
    norm_eps_key="norm_eps",
    activation="squared_relu",
    partial_rotary=True,
    llama3_rope=False,
)
