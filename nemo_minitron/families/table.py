"""The axis table: one row for each parameter of a model.

A row names a parameter in its Hugging Face checkpoint, labels its dimensions, and says where
the parameter lives in Megatron-Core. The label is the coupling group: whatever is cut from one
axis is cut from every parameter that carries its label. Counting, slicing, loading and saving
all read this table; no layer's axes are written down anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from nemo_minitron.families.shape import ModelShape

Part = Literal["q", "k", "v", "gate", "up"]
LAYER = "{layer}"


@dataclass(frozen=True)
class Row:
    """One parameter (of every layer, when the names hold `{layer}`)."""

    hf: str
    axes: tuple[str, ...]
    megatron: str
    part: Part | None = None
    """Which part of a fused Megatron tensor this is; None: the whole tensor."""

    @property
    def per_layer(self) -> bool:
        return LAYER in self.hf


@dataclass(frozen=True)
class Parameter:
    """A row at a given layer: a concrete tensor."""

    row: Row
    layer: int | None

    @property
    def hf(self) -> str:
        return self.row.hf.replace(LAYER, str(self.layer))

    @property
    def megatron(self) -> str:
        return self.row.megatron.replace(LAYER, str(self.layer))


def rows(shape: ModelShape) -> tuple[Row, ...]:
    """Every row of a model of this shape, in the order of the network."""
    return (
        Row("model.embed_tokens.weight", ("vocab", "hidden"), "embedding.word_embeddings.weight"),
        *_norm_rows(shape, "model.layers.{layer}.input_layernorm", "decoder.layers.{layer}.input_layernorm"),
        *_attention_rows(shape),
        *_norm_rows(shape, "model.layers.{layer}.post_attention_layernorm", "decoder.layers.{layer}.pre_mlp_layernorm"),
        *_mlp_rows(shape),
        *_norm_rows(shape, "model.norm", "decoder.final_layernorm"),
        *(() if shape.tied_embeddings else (Row("lm_head.weight", ("vocab", "hidden"), "output_layer.weight"),)),
    )


def _norm_rows(shape: ModelShape, hf: str, megatron: str) -> Iterator[Row]:
    yield Row(f"{hf}.weight", ("hidden",), f"{megatron}.weight")
    if shape.norm == "layernorm1p":
        yield Row(f"{hf}.bias", ("hidden",), f"{megatron}.bias")


def _attention_rows(shape: ModelShape) -> Iterator[Row]:
    hf, megatron = "model.layers.{layer}.self_attn", "decoder.layers.{layer}.self_attention"
    parts: tuple[tuple[Part, str], ...] = (("q", "q"), ("k", "kv"), ("v", "kv"))
    for part, axis in parts:
        yield Row(f"{hf}.{part}_proj.weight", (axis, "hidden"), f"{megatron}.linear_qkv.weight", part)
        if shape.qkv_bias:
            yield Row(f"{hf}.{part}_proj.bias", (axis,), f"{megatron}.linear_qkv.bias", part)
    if shape.qk_norm:
        yield Row(f"{hf}.q_norm.weight", ("head_dim",), f"{megatron}.q_layernorm.weight")
        yield Row(f"{hf}.k_norm.weight", ("head_dim",), f"{megatron}.k_layernorm.weight")
    yield Row(f"{hf}.o_proj.weight", ("hidden", "q"), f"{megatron}.linear_proj.weight")


def _mlp_rows(shape: ModelShape) -> Iterator[Row]:
    hf, megatron = "model.layers.{layer}.mlp", "decoder.layers.{layer}.mlp"
    if shape.gated:
        yield Row(f"{hf}.gate_proj.weight", ("ffn", "hidden"), f"{megatron}.linear_fc1.weight", "gate")
        yield Row(f"{hf}.up_proj.weight", ("ffn", "hidden"), f"{megatron}.linear_fc1.weight", "up")
    else:
        yield Row(f"{hf}.up_proj.weight", ("ffn", "hidden"), f"{megatron}.linear_fc1.weight")
    yield Row(f"{hf}.down_proj.weight", ("hidden", "ffn"), f"{megatron}.linear_fc2.weight")


def parameters(shape: ModelShape) -> Iterator[Parameter]:
    """Every tensor of the model: rows outside the layers once, the others once for each layer."""
    for row in rows(shape):
        for layer in range(shape.num_layers) if row.per_layer else (None,):
            yield Parameter(row, layer)


def tensor_shape(shape: ModelShape, row: Row) -> tuple[int, ...]:
    """Dimensions of one parameter in its Hugging Face checkpoint."""
    sizes = shape.axis_sizes()
    return tuple(sizes[axis] for axis in row.axes)


def num_params(shape: ModelShape, *, embeddings: bool = True) -> int:
    """Exact parameter count; tied embeddings count once.

    Args:
        embeddings: False leaves out every parameter with a vocab axis ("non-embedding" parameters).
    """
    return sum(
        prod(tensor_shape(shape, row)) * (shape.num_layers if row.per_layer else 1)
        for row in rows(shape)
        if embeddings or "vocab" not in row.axes
    )
