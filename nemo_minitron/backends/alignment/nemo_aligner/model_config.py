"""The model config of NeMo 2.1 for a model's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.errors import ConfigError
from nemo_minitron.families import ModelShape
from nemo_minitron.families.shape import Llama3RopeScaling

NEMO_ROPE_FACTOR = 8.0
"""The only factor of Llama 3.1's rope scaling that NeMo's `scale_positional_embedding` supports (its
apply_rope_scaling)."""
REWARD_DIR = "nemo"
"""Folder of the NeMo checkpoint in a published reward model."""
ACTIVATIONS = {"swiglu": "fast-swiglu", "squared_relu": "squared-relu"}


def nemo_model_config(
    shape: ModelShape, tokenizer_dir: Path, *, seq_len_tokens: int, on_cpu: bool, where: str, tp: int = 1
) -> dict[str, Any]:
    """Return the content of a checkpoint's `model_config.yaml` for this shape.

    NeMo 2.1's own converter is wrong for width-pruned models, where it assumes head size = hidden / heads, and for
    Llama 3.1, where it interpolates positions by 8 on top of the rope scaling. Here both are explicit.

    Args:
        tokenizer_dir: a Hugging Face tokenizer.
        tp: tensor-parallel ranks; the vocabulary is padded to a multiple of this, and no further.
        where: the model, for error messages.

    Raises:
        ConfigError: NeMo 2.1 does not support this model.
    """
    _require_known(shape, where)
    if on_cpu and shape.norm == "layernorm1p":
        raise ConfigError(
            "Norms with 1 + weight (Nemotron, Minitron) need Transformer Engine in NeMo 2.1.",
            where=where,
            next_step="Align this model on a GPU.",
        )
    return {
        "mcore_gpt": True,
        "transformer_engine": not on_cpu,
        "use_cpu_initialization": on_cpu,
        "precision": 32 if on_cpu else "bf16",
        "megatron_amp_O2": not on_cpu,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": shape.norm,
        "layernorm_epsilon": shape.norm_eps,
        "activation": ACTIVATIONS[shape.activation],
        "bias": False,
        "qkv_bias": shape.qkv_bias,
        "position_embedding_type": "rope",
        "rotary_base": shape.rope_theta,
        "rotary_percentage": shape.rotary_fraction,
        "scale_positional_embedding": shape.rope_scaling is not None,
        "seq_len_interpolation_factor": None,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "override_vocab_size": -(-shape.vocab_size // tp) * tp,
        "encoder_seq_length": seq_len_tokens,
        "max_position_embeddings": shape.max_position_embeddings,
        "tokenizer": _tokenizer(tokenizer_dir),
        **_TRAINING_SWITCHES,
        **(WITHOUT_FUSED_KERNELS if on_cpu else {}),
    }


_TRAINING_SWITCHES: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "rampup_batch_size": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
    "init_method_std": 0.02,
    "use_scaled_init_method": True,
    "apply_query_key_layer_scaling": False,
    "do_layer_norm_weight_decay": False,
    "make_vocab_size_divisible_by": 128,
    "pre_process": True,
    "post_process": True,
    "headscale": False,
    "transformer_block_type": "pre_ln",
    "attention_type": "multihead",
    "native_amp_init_scale": 4294967296,
    "native_amp_growth_interval": 1000,
    "hysteresis": 2,
    "fp32_residual_connection": False,
    "fp16_lm_cross_entropy": False,
    "grad_allreduce_chunk_size_mb": 125,
    "grad_div_ar_fusion": False,
    "seed": 1234,
    "onnx_safe": False,
    "gradient_as_bucket_view": True,
    "sync_batch_comm": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "num_micro_batches_with_partial_activation_checkpoints": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "fp8": False,
    "use_emha": False,
    "dist_ckpt_format": "torch_dist",
    "dist_ckpt_load_on_device": False,
}
WITHOUT_FUSED_KERNELS = {
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_add_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}


def tokenizer_dir(nemo: Path) -> Path:
    """Return the folder beside a NeMo checkpoint that has its Hugging Face tokenizer."""
    return nemo.with_name(f"{nemo.name}.tokenizer")


def _tokenizer(folder: Path) -> dict[str, Any]:
    unused = {"model": None, "vocab_file": None, "merge_file": None, "delimiter": None, "sentencepiece_legacy": False}
    return {"library": "huggingface", "type": str(folder), "use_fast": True, **unused}


def unknown_to_nemo(shape: ModelShape) -> str | None:
    """Return the first feature of this model that NeMo 2.1 does not support; None: it supports all."""
    scaling: Llama3RopeScaling | None = shape.rope_scaling
    window = shape.sliding_window_tokens
    reasons = {
        "norms of queries and keys": shape.qk_norm,
        "an attention window": window is not None and window < shape.max_position_embeddings,
        "a rope scaling factor other than 8": scaling is not None and scaling.factor != NEMO_ROPE_FACTOR,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _require_known(shape: ModelShape, where: str) -> None:
    reason = unknown_to_nemo(shape)
    if reason is not None:
        raise ConfigError(
            f"NeMo 2.1, on which NeMo-Aligner builds, does not support {reason}.",
            where=where,
            allowed="Llama, Mistral without a window, Nemotron and Minitron models",
            next_step="Align another family, or align this model with another tool after export.",
        )
