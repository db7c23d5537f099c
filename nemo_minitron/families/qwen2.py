"""Qwen 2 and 2.5: biases of the query, key and value projections."""

from nemo_minitron.families.family import SWIGLU_DEFAULTS, Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={**SWIGLU_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    qkv_bias=True,
    sliding_window="some_layers",
)
