"""The registry of axes: what can be cut from a model, and how each cut reaches its tensors. No torch.

Each dimension of a parameter carries a label (`families/table.py`). Cutting an axis keeps some of its indices, in every
dimension that carries one of its labels. Selection, plan files, slicing, sharding, scores, reports and checks iterate
this registry; a new axis is one entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScoredAt = Literal["norm_outputs", "mlp_neurons", "attention_heads", "layers"]
"""Where an axis's importance is measured (2407.14679, section 2.2)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Axis:
    """One axis of a model. Its length is the field `target_key` of ModelShape. Compared by identity."""

    name: str
    """Name in scores and in the keep lists of a plan."""
    title: str
    """Name in tables and messages."""
    target_key: str
    """Field of ModelShape, and key of a recipe's `target`."""
    letter: str = ""
    """Letter in the names of a search's candidates; none for an axis that is never cut."""
    coupled: tuple[str, ...] = ()
    """Labels of the dimensions that are cut together; none for layers, whose parameters go as a whole."""
    unit: str | None = None
    """Field of ModelShape with the number of positions of one index; None: one."""
    per_layer: bool = False
    """Whether each layer keeps indices of its own."""
    split_by: Literal["tensor", "pipeline"] | None = None
    """Kind of parallelism that divides the axis over ranks; None: each rank has all of it."""
    scored_at: ScoredAt | None = None
    """Where its importance is measured; None: it is derived from the scores of the axis inside it."""
    inside: str | None = None
    """Axis whose indices each hold the same number of indices of this one: heads are inside query groups."""


HIDDEN = Axis(
    name="hidden",
    title="hidden size",
    target_key="hidden_size",
    letter="h",
    coupled=("hidden",),
    scored_at="norm_outputs",
)
FFN = Axis(
    name="ffn",
    title="MLP neurons",
    target_key="ffn_hidden_size",
    letter="f",
    coupled=("ffn",),
    per_layer=True,
    split_by="tensor",
    scored_at="mlp_neurons",
)
GROUPS = Axis(
    name="groups",
    title="key/value heads",
    target_key="num_query_groups",
    letter="g",
    coupled=("kv",),
    unit="kv_channels",
    per_layer=True,
    split_by="tensor",
)
HEADS = Axis(
    name="heads",
    title="attention heads",
    target_key="num_attention_heads",
    letter="a",
    coupled=("q",),
    unit="kv_channels",
    per_layer=True,
    split_by="tensor",
    scored_at="attention_heads",
    inside="groups",
)
LAYERS = Axis(
    name="layers", title="layers", target_key="num_layers", letter="l", split_by="pipeline", scored_at="layers"
)

WIDTH_AXES = (HIDDEN, FFN, GROUPS, HEADS)
"""Axes inside the layers; an axis that holds another comes before it."""
SCORED_WIDTH_AXES = tuple(axis for axis in WIDTH_AXES if axis.scored_at is not None)
AXES = (*WIDTH_AXES, LAYERS)

VOCAB = Axis(name="vocab", title="vocabulary", target_key="vocab_size", coupled=("vocab",), split_by="tensor")
HEAD_DIM = Axis(name="head_dim", title="head size", target_key="kv_channels", coupled=("head_dim",))
FIXED_AXES = (VOCAB, HEAD_DIM)
"""Axes that parameters have and that are never cut."""

SPLIT_LABELS = frozenset(
    label for axis in (*WIDTH_AXES, *FIXED_AXES) if axis.split_by == "tensor" for label in axis.coupled
)
"""Labels of the dimensions that tensor parallelism splits; all others are whole on each rank."""
SIZE_KEYS = frozenset(axis.target_key for axis in AXES) | {axis.unit for axis in AXES if axis.unit is not None}
"""Fields of ModelShape that describe a cut: the sizes that it can change, and the units that they are counted in."""


def holder_of(axis: Axis) -> Axis | None:
    """Return the axis that `axis` is inside of."""
    return next((other for other in AXES if other.name == axis.inside), None)


def content_of(axis: Axis) -> Axis | None:
    """Return the axis that is inside `axis`."""
    return next((other for other in AXES if other.inside == axis.name), None)


def chosen_by(axis: Axis) -> tuple[Axis, ...]:
    """Return the axes whose indices are chosen by the scores of `axis`: itself, and one that it is inside of."""
    holder = holder_of(axis)
    return (axis,) if holder is None or holder.scored_at is not None else (axis, holder)
