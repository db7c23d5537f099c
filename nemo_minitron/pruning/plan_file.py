"""prune_plan.json: the indices that stay on each axis, in a form that people can read and edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_minitron.errors import ArtifactError
from nemo_minitron.families import ModelShape, num_params
from nemo_minitron.families.axes import AXES, GROUPS, LAYERS, Axis, holder_of
from nemo_minitron.families.registry import axes_of, width_axes
from nemo_minitron.pruning.merge import SHARES

PLAN_FILE = "prune_plan.json"
SCHEMA = 1
ALL = "all"
"""Text in a plan that means every index of an axis."""
OFF = "off"
"""Empty mapping: no heads are merged."""
Indices = tuple[int, ...]
"""Kept indices, 0-based and ascending."""
AXIS_KEYS = {axis.name: axis.target_key for axis in AXES}
"""Axis -> field of ModelShape with its size."""


@dataclass(frozen=True)
class PrunePlan:
    """Kept indices of each axis. Layers are numbered as in the teacher."""

    method: str
    layers: Indices
    shared: Mapping[str, Indices]
    """Axis -> the indices that are kept in the whole model."""
    by_layer: Mapping[str, Mapping[int, Indices]]
    """Axis -> layer -> the indices that are kept in that layer."""
    head_merge: str = OFF
    merged: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    """Layer -> kept head -> the cut head that is merged into it."""

    def kept(self, axis: Axis, layer: int | None) -> Indices:
        """Return the kept indices of a width axis in one layer; the layer may be None if the axis is shared."""
        if not axis.per_layer:
            return self.shared[axis.name]
        assert layer is not None
        return self.by_layer[axis.name][layer]

    def target_shape(self, source: ModelShape) -> ModelShape:
        """Return the shape that is left of `source`; the first layer with an axis gives its size."""
        sizes = {AXIS_KEYS[name]: len(kept) for name, kept in self.shared.items()}
        sizes |= {AXIS_KEYS[name]: len(next(iter(lists.values()))) for name, lists in self.by_layer.items()}
        return source.resized(**sizes, **{LAYERS.target_key: len(self.layers)})


def write_plan(plan: PrunePlan, source: ModelShape, folder: Path) -> dict[str, Any]:
    """Write prune_plan.json, and return its content."""
    target = plan.target_shape(source)
    by_layer = {
        axis: {str(layer): to_ranges(kept) for layer, kept in lists.items()} for axis, lists in plan.by_layer.items()
    }
    document = {
        "schema": SCHEMA,
        "method": plan.method,
        "source": source.sizes(),
        "target": target.sizes(),
        "num_params": {"source": num_params(source), "target": num_params(target)},
        "keep": {
            LAYERS.name: to_ranges(plan.layers),
            **{axis: to_ranges(kept) for axis, kept in plan.shared.items()},
            **by_layer,
        },
        "head_merge": plan.head_merge,
        "merged_heads": {
            str(layer): {str(kept): cut for kept, cut in partners.items()} for layer, partners in plan.merged.items()
        },
    }
    (folder / PLAN_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return document


def read_plan(folder: Path, source: ModelShape) -> PrunePlan:
    """Read a plan and check it against the model that it is to cut.

    Raises:
        ArtifactError: the plan is damaged, was made for another model, or has impossible indices.
    """
    file = folder / PLAN_FILE
    document = _read_document(file)
    if document["source"] != source.sizes():
        raise ArtifactError(
            f"The plan was made for {document['source']}, but the model is {source.sizes()}.",
            where=str(file),
        )
    try:
        plan = _parse(document, source)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"The prune plan is not valid: {error!r}",
            where=str(file),
            allowed=f'ascending 0-based ranges such as "0-20,22", or "{ALL}"',
        ) from error
    _require_sound(plan, source, document["target"], file)
    return plan


def _read_document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA or not {"source", "target", "keep", "method"} <= document.keys():
            raise ValueError(f"not a plan of schema {SCHEMA}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"The prune plan cannot be read: {error!r}", where=str(file)) from error
    return dict(document)


def _parse(document: Mapping[str, Any], source: ModelShape) -> PrunePlan:
    keep = document["keep"]
    layers = from_ranges(keep[LAYERS.name], source.num_layers)

    def by_layer(axis: Axis) -> dict[int, Indices]:
        # Plans that were written before query groups could be cut have no list of them.
        lists = keep.get(axis.name, ALL) if axis is GROUPS else keep[axis.name]
        size = getattr(source, axis.target_key)
        having = (layer for layer in layers if axis in axes_of(source, layer))
        return {layer: from_ranges(ALL if lists == ALL else lists[str(layer)], size) for layer in having}

    axes = width_axes(source)
    return PrunePlan(
        method=str(document["method"]),
        layers=layers,
        shared={
            axis.name: from_ranges(keep[axis.name], getattr(source, axis.target_key))
            for axis in axes
            if not axis.per_layer
        },
        by_layer={axis.name: by_layer(axis) for axis in axes if axis.per_layer},
        head_merge=document.get("head_merge", OFF),
        merged=_parse_merged(document, layers, source),
    )


def _parse_merged(document: Mapping[str, Any], layers: Sequence[int], source: ModelShape) -> dict[int, dict[int, int]]:
    how, merged = document.get("head_merge", OFF), document.get("merged_heads", {})
    if how != OFF and how not in SHARES:
        raise ValueError(f"head_merge {how!r} is not one of {', '.join([OFF, *SHARES])}")
    out = {
        layer: {int(kept): int(cut) for kept, cut in merged.get(str(layer), {}).items()}
        for layer in (layers if how != OFF else ())
    }
    heads = {head for partners in out.values() for pair in partners.items() for head in pair}
    if heads and not 0 <= min(heads) <= max(heads) < source.num_attention_heads:
        raise ValueError(f"merged_heads has a head that is not below {source.num_attention_heads}")
    return out


def require_uniform(plan: PrunePlan, where: str) -> None:
    """Require that each layer keeps as much of an axis as all others, as a config.json and Megatron can express.

    The plan format itself allows layers of different sizes.

    Raises:
        ArtifactError: with the axis and the sizes.
    """
    for name, by_layer in plan.by_layer.items():
        counts = {layer: len(keep) for layer, keep in by_layer.items()}
        if len(set(counts.values())) > 1:
            raise ArtifactError(
                f"keep.{name} has layers of different sizes: {counts}.",
                where=where,
                next_step="Keep the same number in each layer; a model has one size for all layers.",
            )


def _require_sound(plan: PrunePlan, source: ModelShape, target: Any, file: Path) -> None:
    """Require that axes inside others keep the same number in each index of these, and that the target is what is left.

    Raises:
        ArtifactError: with the keep lists or sizes that contradict each other.
    """
    for axis in width_axes(source):
        holder = holder_of(axis)
        if holder is not None:
            for layer in plan.by_layer[axis.name]:
                _require_same_number_in_each(plan, axis, holder, layer, source, file)
    left = plan.target_shape(source).sizes()
    for name, by_layer in plan.by_layer.items():
        if len({len(keep) for keep in by_layer.values()}) > 1:
            left[AXIS_KEYS[name]] = target[AXIS_KEYS[name]]
    if target != left:
        raise ArtifactError(
            f"The keep lists leave {left}, but target is {target}.",
            where=str(file),
            next_step="Correct the wrong one of the two.",
        )


def _require_same_number_in_each(
    plan: PrunePlan, axis: Axis, holder: Axis, layer: int, source: ModelShape, file: Path
) -> None:
    per_holder = getattr(source, axis.target_key) // getattr(source, holder.target_key)
    kept = plan.kept(holder, layer)
    counts = dict.fromkeys(kept, 0)
    for index in plan.kept(axis, layer):
        counts[index // per_holder] = counts.get(index // per_holder, 0) + 1
    if counts.keys() != set(kept) or len(set(counts.values())) > 1:
        raise ArtifactError(
            f"keep.{axis.name}.{layer} keeps different numbers of {axis.name} in the {holder.name}: {counts}; "
            f"keep.{holder.name}.{layer} is {to_ranges(kept)}.",
            where=str(file),
            allowed=f"the same number of {axis.name} in each of the {holder.name} that stay, none in the others",
        )


def to_ranges(indices: Sequence[int]) -> str:
    """Write ascending indices as text: [0, 1, 2, 5] -> "0-2,5"."""
    ends = [i for i, (a, b) in enumerate(pairwise(indices)) if b != a + 1]
    bounds = pairwise([-1, *ends, len(indices) - 1])
    runs = [(indices[before + 1], indices[last]) for before, last in bounds]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: str, size: int | None = None) -> Indices:
    """Read indices from text, as `to_ranges` writes them; "all" stands for every index below `size`.

    Raises:
        ValueError: the indices are not ascending, are missing, or are not below `size`.
    """
    if text == ALL and size is not None:
        return tuple(range(size))
    out: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first) + 1
        # Checked before the range is expanded, so that a typing error cannot fill the memory.
        if start >= stop or (out and start <= out[-1]) or (size is not None and stop > size):
            limit = "" if size is None else f" of indices below {size}"
            raise ValueError(f"{part.strip()!r} in {text[:40]!r} is not part of an ascending list{limit}")
        out.extend(range(start, stop))
    return tuple(out)
