"""Layer specs: Transformer Engine modules where it is installed, plain torch modules elsewhere.

Norms and linears are separate modules in both (no fused layer-norm linear), so that one parameter table and one set of
hooks serves both.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from nemo_minitron.backends.megatron.model.documents import document_bounds, mask_between_documents
from nemo_minitron.backends.megatron.runtime.context import context_attention
from nemo_minitron.backends.megatron.runtime.cpu import cuda_is_cpu
from nemo_minitron.backends.megatron.runtime.torch_versions import attention
from nemo_minitron.backends.megatron.runtime.versions import context_group, mlp_spec
from nemo_minitron.errors import EnvironmentProblem


class TorchNorm(nn.Module):
    """RMSNorm, or LayerNorm whose stored weight is centered on zero (w + 1), in plain torch.

    Statistics are computed in fp32 (fp64 stays fp64), as in the Hugging Face models that the weights come from.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        dtype = config.params_dtype
        self.weight = nn.Parameter(torch.full((hidden_size,), 0.0 if self.zero_centered else 1.0, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(hidden_size, dtype=dtype)) if config.normalization == "LayerNorm" else None,
        )
        for parameter in self.parameters():
            # Tells Megatron to sum these gradients over the tensor-parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        bias, wide = self.bias, torch.promote_types(hidden_SBD.dtype, torch.float32)
        if not isinstance(bias, Tensor):
            normed = F.rms_norm(hidden_SBD.to(wide), hidden_SBD.shape[-1:], None, self.eps)
            return self.weight * normed.to(hidden_SBD.dtype)
        weight = self.weight.to(wide) + float(self.zero_centered)
        normed = F.layer_norm(hidden_SBD.to(wide), hidden_SBD.shape[-1:], weight, bias.to(wide), self.eps)
        return normed.to(hidden_SBD.dtype)


class SdpaCoreAttention(nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, with grouped queries.

    A mask (True: masked) replaces the causal mask. With context parallelism the ranks' keys and values are gathered,
    and the mask has this rank's rows.

    Shapes: query [S, B, heads, head_dim], key and value [S, B, groups, head_dim] of this
    tensor-parallel rank; returns [S, B, heads * head_dim].
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *_: Any, pg_collection: Any = None, **__: Any
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.context_group = context_group(pg_collection) if config.context_parallel_size > 1 else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        may_look = None if attention_mask is None else ~attention_mask
        if self.context_group is not None:
            out = context_attention(query, key, value, may_look, self.context_group)
        else:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = attention(q, k, v, may_look, causal=may_look is None)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine is installed and this session has a GPU for it to run on.

    Raises:
        EnvironmentProblem: it is installed, but cannot be imported. Torch layers would be slower without a word.
    """
    if cuda_is_cpu() or not torch.cuda.is_available() or find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # its libraries fail in several ways
        raise EnvironmentProblem(
            f"Transformer Engine is installed, but cannot be imported: {error}",
            next_step="Install the version that this torch and CUDA need, or uninstall transformer-engine to use torch "
            "layers.",
        ) from error
    return True


def layers_in_use() -> str:
    """Return the name of the modules that layers are made of, for the records of a stage."""
    return "transformer_engine" if has_transformer_engine() else "torch"


def fuse_weight_gradients(model: nn.Module) -> None:
    """Let Transformer Engine's linear layers add their weight gradients to Megatron's gradient buffers themselves.

    Call this after the data-parallel wrapper has made the buffers. The config's gradient_accumulation_fusion would
    require Apex for the output layer, whose product is not computed by Megatron here.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation") and hasattr(getattr(module, "weight", None), "main_grad"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def separation_of_documents(tokens_BS: Tensor, eod_id: int) -> Tensor:
    """Return what keeps the documents of a batch apart in the attention of this session's layers: bounds or a mask."""
    return (document_bounds if has_transformer_engine() else mask_between_documents)(tokens_BS, eod_id)


def require_document_mask(reset_attention_mask: bool, cp: int) -> None:
    """Raise EnvironmentProblem if attention must not cross documents but the attention module cannot do that."""
    # The bounds of documents are those of whole samples, which context parallelism splits.
    if reset_attention_mask and cp > 1 and has_transformer_engine():
        raise EnvironmentProblem(
            f"reset_attention_mask = True with execution.parallel.cp = {cp}: Transformer Engine's attention would see "
            "across documents.",
            allowed="cp = 1, or torch attention (without Transformer Engine or without a GPU)",
            next_step="Set reset_attention_mask to false or cp to 1, or use an environment without transformer-engine.",
        )


def _modules() -> dict[str, Any]:
    if not has_transformer_engine():
        return {
            "norm": TorchNorm,
            "column": ColumnParallelLinear,
            "row": RowParallelLinear,
            "attention": SdpaCoreAttention,
        }
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

    from nemo_minitron.backends.megatron.model.engine_attention import EngineAttention

    return {
        "norm": TENorm,
        "column": TEColumnParallelLinear,
        "row": TERowParallelLinear,
        "attention": EngineAttention,
    }


def norm() -> Any:
    """Return the norm class."""
    return _modules()["norm"]


def attention_parts(*, qk_norm: bool) -> dict[str, Any]:
    """Return the submodules of a layer's attention."""
    modules = _modules()
    head_norm = modules["norm"] if qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=modules["column"],
        core_attention=modules["attention"],
        linear_proj=modules["row"],
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return {
        "input_layernorm": modules["norm"],
        "self_attention": ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        "self_attn_bda": get_bias_dropout_add,
    }


def mlp_parts() -> dict[str, Any]:
    """Return the submodules of a layer's MLP."""
    modules = _modules()
    return {
        "pre_mlp_layernorm": modules["norm"],
        "mlp": mlp_spec(MLPSubmodules(linear_fc1=modules["column"], linear_fc2=modules["row"])),
        "mlp_bda": get_bias_dropout_add,
    }


def block_spec(num_local_layers: int, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Return the spec of this pipeline stage's layers and the final norm."""
    layer = TransformerLayerSubmodules(**attention_parts(qk_norm=qk_norm), **mlp_parts())
    specs = [ModuleSpec(module=TransformerLayer, submodules=layer)] * num_local_layers
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm())
