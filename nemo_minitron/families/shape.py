"""Sizes and switches of a decoder-only transformer, independent of any framework. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from nemo_minitron.families.axes import (
    AXES,
    FIXED_AXES,
    GROUPS,
    HEADS,
    LAYERS,
    SIZE_KEYS,
    WIDTH_AXES,
    Axis,
    content_of,
    holder_of,
)

Norm = Literal["rmsnorm", "layernorm1p"]
Activation = Literal["swiglu", "squared_relu"]


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1. Its three other constants are fixed (1, 4, 8192)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that determines the parameters and the arithmetic of one model.

    `kv_channels` is the size of one head. It is explicit because the heads of a width-pruned model no longer add up to
    `hidden_size`.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    norm: Norm
    norm_eps: float
    activation: Activation
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rotary_fraction: float
    rope_scaling: Llama3RopeScaling | None
    sliding_window_tokens: int | None

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    def sizes(self) -> dict[str, int]:
        """Return the sizes that pruning can change, and the units that they are counted in."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in SIZE_KEYS}

    def axis_sizes(self) -> dict[str, int]:
        """Return the length of each label that a dimension of a parameter can carry."""
        return {
            label: getattr(self, axis.target_key) * (1 if axis.unit is None else getattr(self, axis.unit))
            for axis in (*WIDTH_AXES, *FIXED_AXES)
            for label in axis.coupled
        }

    def resized(self, **sizes: int) -> ModelShape:
        """Return a copy with other sizes; `kv_channels` stays unless it is given."""
        return replace(self, **sizes)  # type: ignore[arg-type]


SIZE_AXES: tuple[Axis, ...] = tuple(
    axis for field in fields(ModelShape) for axis in (*AXES, *FIXED_AXES) if axis.target_key == field.name
)
"""Axes in the order in which a shape lists its sizes, for tables."""

SIZE_COLUMNS: tuple[tuple[Axis, ...], ...] = tuple(
    tuple(part for part in (axis, holder_of(axis)) if part is not None)
    for axis in SIZE_AXES
    if axis in AXES and content_of(axis) is None
)
"""Sizes that can change, by column of a table: an axis, followed by the axis that it is inside of: heads, groups."""

TargetSizes = Iterable[tuple[str, int | None]]
"""Pairs of a field of ModelShape and a student's size; a size that is None or missing stays as in the source."""


def target_shape(source: ModelShape, target: TargetSizes, drop_layers: Collection[int] | None) -> ModelShape:
    """Return the shape that is left of `source`.

    Where each head is its own query group, the groups follow the heads. Where only the groups are given, each keeps all
    of its heads.
    """
    sizes = {key: size for key, size in target if size}
    heads, groups = sizes.get(HEADS.target_key), sizes.get(GROUPS.target_key)
    if heads is None and groups is not None:
        sizes[HEADS.target_key] = groups * source.heads_per_group
    elif heads is not None and groups is None and source.heads_per_group == 1:
        sizes[GROUPS.target_key] = heads
    if LAYERS.target_key not in sizes:
        sizes[LAYERS.target_key] = source.num_layers - len(set(drop_layers or ()))
    return source.resized(**sizes)
