"""Mistral and Mistral-NeMo."""

from nemo_minitron.families.family import SWIGLU_DEFAULTS, Family

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={
        **SWIGLU_DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    sliding_window="every_layer",
)
