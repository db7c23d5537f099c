"""Build a Megatron-Core model from a ModelShape: GPTModel, or HybridModel if the environment variable selects it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_minitron.backends.megatron.model.layers import block_spec, has_transformer_engine
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.runtime.versions import GPTModel, known_fields, rope_scaling_options, squared_relu
from nemo_minitron.errors import EnvironmentProblem, PlanError
from nemo_minitron.families import ModelShape
from nemo_minitron.families.split import padded_vocab_size, stage_bounds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


MODEL_CLASS_VARIABLE = "MINITRON_MODEL_CLASS"
"""gpt or hybrid, to test GPTModel's successor: numbers are equal, training checkpoints are not interchangeable."""
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(shape: ModelShape, session: Session, precision: str) -> TransformerConfig:
    """Return Megatron's config of this shape in this session.

    Fusions that need CUDA kernels are disabled on the CPU.
    """
    parallel = session.parallel
    options: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": "RMSNorm" if shape.norm == "rmsnorm" else "LayerNorm",
        "layernorm_zero_centered_gamma": shape.norm == "layernorm1p",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": shape.gated,
        "activation_func": F.silu if shape.gated else squared_relu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sequence_parallel and parallel.tp > 1,
        "params_dtype": DTYPES[precision],
        "pipeline_dtype": DTYPES[precision],
        "bf16": precision == "bf16",
        "use_cpu_initialization": not session.on_gpu,
        "perform_initialization": False,
        "bias_activation_fusion": session.on_gpu and shape.gated,  # Megatron refuses it for squared ReLU
        "bias_dropout_fusion": session.on_gpu,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": session.kernels.fuse_rope and has_transformer_engine(),
        "gradient_accumulation_fusion": False,
        "batch_p2p_comm": session.on_gpu,
        "deallocate_pipeline_outputs": True,
        **_RECOMPUTE[parallel.recompute],
    }
    if _wants_hybrid():
        return TransformerConfig(**known_fields(TransformerConfig, _hybrid().as_hybrid(options)))
    bounds = stage_bounds(shape.num_layers, parallel.pp)
    if shape.num_layers % parallel.pp:
        options["num_layers_in_first_pipeline_stage"] = bounds[0][1] - bounds[0][0]
        options["num_layers_in_last_pipeline_stage"] = bounds[-1][1] - bounds[-1][0]
    return TransformerConfig(**known_fields(TransformerConfig, options))


def _wants_hybrid() -> bool:
    return os.environ.get(MODEL_CLASS_VARIABLE) == "hybrid"


def _hybrid() -> ModuleType:
    if find_spec("megatron.core.models.hybrid") is None:
        raise EnvironmentProblem(
            f"{MODEL_CLASS_VARIABLE} = hybrid, but this Megatron-Core has no HybridModel.",
            allowed="gpt",
            next_step="Use megatron-core 0.19 or later, or unset the variable.",
        )
    from nemo_minitron.backends.megatron.model import hybrid

    return hybrid


def build_model(
    shape: ModelShape, session: Session, *, precision: str, seq_len_tokens: int, padded_vocab: int | None = None
) -> Model:
    """Build this rank's part of the model, with uninitialized weights.

    Args:
        padded_vocab: rows of the embeddings; None: as few as the layout allows.

    Raises:
        PlanError: the sequence is longer than the model's sliding window.
    """
    require_window(shape, seq_len_tokens)
    start, stop = stage_bounds(shape.num_layers, session.parallel.pp)[session.pp_rank]
    ends = (session.is_first_stage, session.is_last_stage)
    return _build(shape, session, precision, seq_len_tokens, stop - start, ends, padded_vocab)


def build_layer(shape: ModelShape, session: Session, *, precision: str, seq_len_tokens: int) -> Model:
    """Build one layer without embeddings and head, as of a stage in the middle of a pipeline, with unset weights.

    Give it the residual stream [S, B, D] with `set_input_tensor`. The layer is whole: the session has tp = pp = cp = 1.

    Raises:
        PlanError: the sequence is longer than the model's sliding window.
    """
    require_window(shape, seq_len_tokens)
    one = shape.resized(num_layers=1)
    return _build(one, session, precision, seq_len_tokens, 1, (False, False), None)


def require_window(shape: ModelShape, seq_len_tokens: int) -> None:
    """Require a sequence that fits into the model's sliding window.

    Raises:
        PlanError: it does not.
    """
    window = shape.sliding_window_tokens
    if window is not None and seq_len_tokens > window:
        raise PlanError(
            f"seq_len_tokens = {seq_len_tokens} is longer than the model's sliding window of {window} tokens.",
            allowed=f"at most {window}",
        )


def _build(
    shape: ModelShape,
    session: Session,
    precision: str,
    seq_len_tokens: int,
    num_layers: int,
    ends: tuple[bool, bool],
    padded_vocab: int | None,
) -> Model:
    """Build `num_layers` layers of a model; `ends` says whether they come with the embeddings and with the head."""
    config = transformer_config(shape, session, precision)
    options = {
        "vocab_size": padded_vocab or padded_vocab_size(shape.vocab_size, session.parallel.tp),
        "max_sequence_length": seq_len_tokens,
        "pre_process": ends[0],
        "post_process": ends[1],
        "parallel_output": True,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_percent": shape.rotary_fraction,
        "rotary_base": shape.rope_theta,
    }
    if _wants_hybrid():
        model = _hybrid().hybrid_model(config, shape, options)
    else:
        spec = block_spec(num_layers, qk_norm=shape.qk_norm)
        model = GPTModel(config, spec, **options, **rope_scaling_options(shape))
    return model.to(device=session.device, dtype=DTYPES[precision])
