"""prune_plan.json: which indices stay on each axis. Made to be read, and edited, by people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_minitron.errors import ArtifactError
from nemo_minitron.families import ModelShape, num_params
from nemo_minitron.pruning.merge import SHARES

PLAN_FILE = "prune_plan.json"
SCHEMA = 1
ALL = "all"
"""Stands for every index of an axis."""
OFF = "off"
"""No heads are merged."""


@dataclass(frozen=True)
class PrunePlan:
    """Kept indices: 0-based, ascending. What differs by layer is keyed by the layer's number in the teacher."""

    method: str
    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: Mapping[int, tuple[int, ...]]
    groups: Mapping[int, tuple[int, ...]]
    """Query groups: the heads of key and value."""
    heads: Mapping[int, tuple[int, ...]]
    head_merge: str = "off"
    merged: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    """Layer -> kept head -> the cut head that is merged into it."""

    def target_shape(self, source: ModelShape) -> ModelShape:
        """The shape that is left of `source`."""
        first = self.layers[0]
        return source.resized(
            num_layers=len(self.layers),
            hidden_size=len(self.hidden),
            ffn_hidden_size=len(self.ffn[first]),
            num_attention_heads=len(self.heads[first]),
            num_query_groups=len(self.groups[first]),
        )


def write_plan(plan: PrunePlan, source: ModelShape, folder: Path) -> dict[str, Any]:
    """Write prune_plan.json; returns its content."""
    target = plan.target_shape(source)
    document = {
        "schema": SCHEMA,
        "method": plan.method,
        "source": source.sizes(),
        "target": target.sizes(),
        "num_params": {"source": num_params(source), "target": num_params(target)},
        "keep": {
            "layers": to_ranges(plan.layers),
            "hidden": to_ranges(plan.hidden),
            "ffn": {str(layer): to_ranges(plan.ffn[layer]) for layer in plan.layers},
            "groups": {str(layer): to_ranges(plan.groups[layer]) for layer in plan.layers},
            "heads": {str(layer): to_ranges(plan.heads[layer]) for layer in plan.layers},
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
        ArtifactError: damaged, made for another model, or with impossible indices.
    """
    file = folder / PLAN_FILE
    document = _read_document(file)
    if document["source"] != source.sizes():
        raise ArtifactError(
            f"The plan was made for {document['source']}, the model is {source.sizes()}.",
            where=str(file),
            next_step="Run the select stage for this model.",
        )
    try:
        plan = _parse(document, source)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"The prune plan cannot be understood: {error!r}",
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
        raise ArtifactError(
            f"The prune plan cannot be read: {error!r}", where=str(file), next_step="Run the select stage again."
        ) from error
    return dict(document)


def _parse(document: Mapping[str, Any], source: ModelShape) -> PrunePlan:
    keep = document["keep"]
    layers = from_ranges(keep["layers"], source.num_layers)

    def by_layer(axis: str, size: int) -> dict[int, tuple[int, ...]]:
        # Plans of before groups could be cut have no list of them.
        lists = keep.get(axis, ALL) if axis == "groups" else keep[axis]
        return {layer: from_ranges(ALL if lists == ALL else lists[str(layer)], size) for layer in layers}

    return PrunePlan(
        method=str(document["method"]),
        layers=layers,
        hidden=from_ranges(keep["hidden"], source.hidden_size),
        ffn=by_layer("ffn", source.ffn_hidden_size),
        groups=by_layer("groups", source.num_query_groups),
        heads=by_layer("heads", source.num_attention_heads),
        head_merge=document.get("head_merge", OFF),
        merged=_parse_merged(document, layers, source),
    )


def _parse_merged(document: Mapping[str, Any], layers: Sequence[int], source: ModelShape) -> dict[int, dict[int, int]]:
    how, merged = document.get("head_merge", OFF), document.get("merged_heads", {})
    if how != OFF and how not in SHARES:
        raise ValueError(f"head_merge {how!r} is none of {', '.join([OFF, *SHARES])}")
    out = {
        layer: {int(kept): int(cut) for kept, cut in merged.get(str(layer), {}).items()}
        for layer in (layers if how != OFF else ())
    }
    heads = {head for partners in out.values() for pair in partners.items() for head in pair}
    if heads and not 0 <= min(heads) <= max(heads) < source.num_attention_heads:
        raise ValueError(f"merged_heads names a head that is not below {source.num_attention_heads}")
    return out


def require_uniform(plan: PrunePlan, where: str) -> None:
    """Every layer keeps as many neurons, groups and heads: what a config.json, and Megatron, can express.

    The plan format itself allows layers of different sizes.

    Raises:
        ArtifactError: naming the axis and the sizes.
    """
    for name, by_layer in (("ffn", plan.ffn), ("groups", plan.groups), ("heads", plan.heads)):
        counts = {layer: len(keep) for layer, keep in by_layer.items()}
        if len(set(counts.values())) > 1:
            raise ArtifactError(
                f"keep.{name} has layers of different sizes: {counts}.",
                where=where,
                next_step="Keep the same number in every layer; a model has one size for all.",
            )


def _require_sound(plan: PrunePlan, source: ModelShape, target: Any, file: Path) -> None:
    """Every query group that stays keeps the same number of heads, the others none; the target is what is left."""
    for layer, heads in plan.heads.items():
        counts = {group: 0 for group in plan.groups[layer]}
        for head in heads:
            group = head // source.heads_per_group
            counts[group] = counts.get(group, 0) + 1
        if counts.keys() != set(plan.groups[layer]) or len(set(counts.values())) > 1:
            raise ArtifactError(
                f"keep.heads.{layer} keeps different numbers of heads in the query groups: {counts}; "
                f"keep.groups.{layer} is {to_ranges(plan.groups[layer])}.",
                where=str(file),
            )
    left = plan.target_shape(source).sizes()
    for axis, size in (("ffn", "ffn_hidden_size"), ("heads", "num_attention_heads"), ("groups", "num_query_groups")):
        if len({len(keep) for keep in getattr(plan, axis).values()}) > 1:
            left[size] = target[size]
    if target != left:
        raise ArtifactError(
            f"The keep lists leave {left}, but target says {target}.",
            where=str(file),
            next_step="Correct whichever of the two is not meant.",
        )


def to_ranges(indices: Sequence[int]) -> str:
    """Ascending indices as text: [0, 1, 2, 5] -> "0-2,5"."""
    ends = [i for i, (a, b) in enumerate(pairwise(indices)) if b != a + 1]
    bounds = pairwise([-1, *ends, len(indices) - 1])
    runs = [(indices[before + 1], indices[last]) for before, last in bounds]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: str, size: int | None = None) -> tuple[int, ...]:
    """The inverse of `to_ranges`; "all" stands for every index below `size`.

    Raises:
        ValueError: not ascending, empty, or not below `size`.
    """
    if text == ALL and size is not None:
        return tuple(range(size))
    out: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first) + 1
        # Checked before the range is spelt out, so that a slip of the pen cannot fill the memory.
        if start >= stop or (out and start <= out[-1]) or (size is not None and stop > size):
            limit = "" if size is None else f" of indices below {size}"
            raise ValueError(f"{part.strip()!r} in {text[:40]!r} is not part of an ascending list{limit}")
        out.extend(range(start, stop))
    return tuple(out)
