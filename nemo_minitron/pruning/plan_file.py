"""prune_plan.json: which indices stay on each axis. Made to be read, and edited, by people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_minitron.errors import ArtifactError
from nemo_minitron.families import ModelShape, num_params

PLAN_FILE = "prune_plan.json"
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


@dataclass(frozen=True)
class PrunePlan:
    """Kept indices: 0-based, ascending. ffn and heads are keyed by the layer's number in the teacher."""

    method: str
    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: Mapping[int, tuple[int, ...]]
    heads: Mapping[int, tuple[int, ...]]

    def target_shape(self, source: ModelShape) -> ModelShape:
        """The shape that is left of `source`."""
        first = self.layers[0]
        return source.resized(
            num_layers=len(self.layers),
            hidden_size=len(self.hidden),
            ffn_hidden_size=len(self.ffn[first]),
            num_attention_heads=len(self.heads[first]),
        )


def write_plan(plan: PrunePlan, source: ModelShape, folder: Path) -> dict[str, Any]:
    """Write prune_plan.json; returns its content."""
    target = plan.target_shape(source)
    document = {
        "schema": 1,
        "method": plan.method,
        "source": _sizes(source),
        "target": _sizes(target),
        "num_params": {"source": num_params(source), "target": num_params(target)},
        "keep": {
            "layers": to_ranges(plan.layers),
            "hidden": to_ranges(plan.hidden),
            "ffn": {str(layer): to_ranges(plan.ffn[layer]) for layer in plan.layers},
            "heads": {str(layer): to_ranges(plan.heads[layer]) for layer in plan.layers},
        },
    }
    (folder / PLAN_FILE).write_text(json.dumps(document, indent=2) + "\n")
    return document


def read_plan(folder: Path, source: ModelShape) -> PrunePlan:
    """Read a plan and check it against the model that it is to cut.

    Raises:
        ArtifactError: damaged, made for another model, or with impossible indices.
    """
    file = folder / PLAN_FILE
    try:
        document = json.loads(file.read_text())
        keep = document["keep"]
        layers = from_ranges(keep["layers"])
        plan = PrunePlan(
            method=document["method"],
            layers=layers,
            hidden=from_ranges(keep["hidden"]),
            ffn={layer: from_ranges(keep["ffn"][str(layer)]) for layer in layers},
            heads={layer: from_ranges(keep["heads"][str(layer)]) for layer in layers},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"The prune plan cannot be read: {error!r}", where=str(file)) from error
    if document["source"] != _sizes(source):
        raise ArtifactError(
            f"The plan was made for {document['source']}, the model is {_sizes(source)}.", where=str(file)
        )
    _check(plan, source, file)
    return plan


def _sizes(shape: ModelShape) -> dict[str, int]:
    return {name: int(getattr(shape, name)) for name in SIZES}


def _check(plan: PrunePlan, source: ModelShape, file: Path) -> None:
    limits = [("layers", plan.layers, source.num_layers), ("hidden", plan.hidden, source.hidden_size)]
    limits += [(f"ffn.{layer}", plan.ffn[layer], source.ffn_hidden_size) for layer in plan.layers]
    limits += [(f"heads.{layer}", plan.heads[layer], source.num_attention_heads) for layer in plan.layers]
    for name, keep, size in limits:
        ascending = all(a < b for a, b in pairwise(keep))
        if not keep or not ascending or keep[-1] >= size:
            raise ArtifactError(f"keep.{name} is not a list of ascending indices below {size}.", where=str(file))
    for name, by_layer in (("ffn", plan.ffn), ("heads", plan.heads)):
        if len({len(keep) for keep in by_layer.values()}) > 1:
            raise ArtifactError(f"keep.{name} has layers of different sizes; Megatron needs one.", where=str(file))


def to_ranges(indices: Sequence[int]) -> str:
    """Ascending indices as text: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[str] = []
    start = previous = None
    for index in [*indices, None]:
        if start is not None and (index is None or index != previous + 1):  # type: ignore[operator]
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = None
        if start is None:
            start = index
        previous = index
    return ",".join(parts)


def from_ranges(text: str) -> tuple[int, ...]:
    """The inverse of `to_ranges`."""
    out: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        out.extend(range(int(first), int(last or first) + 1))
    return tuple(out)
