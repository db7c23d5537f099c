"""Qwen 3: norms of each head's query and key."""

from nemo_minitron.families.family import SWIGLU_DEFAULTS, Family

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**SWIGLU_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    must_be_off=("attention_bias",),
    qk_norm=True,
    sliding_window="some_layers",
)
