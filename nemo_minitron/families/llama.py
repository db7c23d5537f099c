"""Llama 2 to 3.2 and models with the same layers, such as SmolLM2."""

from nemo_minitron.families.family import SWIGLU_DEFAULTS, Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={**SWIGLU_DEFAULTS, "max_position_embeddings": 2048},
    must_be_off=("attention_bias", "mlp_bias"),
    # Since 5.8 transformers refuses a hidden size that is not a multiple of the heads, even if head_dim is given, and
    # width pruning makes such models. Mistral without a sliding window is the same network, and accepts them.
    uneven_heads_as="mistral",
)
