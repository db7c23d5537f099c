"""Build a HybridModel from a ModelShape: GPTModel's successor in Megatron-Core 0.19.

Attention and MLP are separate layers in it. These two need neither Transformer Engine nor Mamba.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemo_minitron.backends.megatron.model.layers import attention_parts, mlp_parts, norm
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.runtime.versions import rope_scaling_options
from nemo_minitron.families import ModelShape
from nemo_minitron.families.split import stage_bounds

LAYER = "*-"
"""Pattern of one attention and one MLP layer in Megatron's notation."""


class _Stack(HybridStack):  # type: ignore[misc]
    """HybridStack whose final norm has the class of the other norms; Megatron always uses Transformer Engine's."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **options: Any) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **options)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = norm()(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def as_hybrid(options: dict[str, Any]) -> dict[str, Any]:
    """Convert config fields of GPTModel to HybridModel, which counts attention and MLP as separate layers."""
    counts: dict[str, Any] = {
        key: options[key] * len(LAYER) for key in ("num_layers", "recompute_num_layers") if key in options
    }
    return {**options, **counts, "is_hybrid_model": True}


def hybrid_model(config: TransformerConfig, shape: ModelShape, options: dict[str, Any]) -> Model:
    """Build a model of attention and MLP layers.

    Args:
        options: arguments that GPTModel and HybridModel share.
    """
    bounds = stage_bounds(shape.num_layers, config.pipeline_model_parallel_size)
    attention = TransformerLayerSubmodules(**attention_parts(qk_norm=shape.qk_norm))
    mlp = TransformerLayerSubmodules(**mlp_parts())
    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(MLPLayer, submodules=mlp),
    )
    pattern = "|".join(LAYER * (stop - start) for start, stop in bounds)
    model = HybridModel(config, ModuleSpec(_Stack, submodules=layers), hybrid_layer_pattern=pattern, **options)
    # HybridModel has no arguments for rope scaling.
    model.rotary_pos_emb = RotaryEmbedding(
        config.kv_channels,
        options["rotary_percent"],
        rotary_base=options["rotary_base"],
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=model.pg_collection.cp,
        **rope_scaling_options(shape),
    )
    return model
