"""The search for a shape: the points of a grid that meet constraints, and the ranking of trained ones. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from nemo_minitron.errors import ArtifactError, PlanError
from nemo_minitron.families import ModelShape, num_params, target_shape
from nemo_minitron.families.axes import AXES, FFN, HIDDEN, LAYERS, WIDTH_AXES
from nemo_minitron.schema.pruning import Target
from nemo_minitron.schema.search import Hardware, SearchConstraints, SearchGrid

SEARCH_FILE = "search.json"
SCHEMA = 1
GIB = 2**30
FFN_EXPANSION = "ffn_expansion"
"""Key of a grid: MLP sizes as multiples of the hidden size."""
TARGET_KEYS = tuple(axis.target_key for axis in AXES)


@dataclass(frozen=True)
class Candidate:
    """One point of the grid, with its estimated costs."""

    name: str
    """Its sizes in the grid, such as l4_h48_f96: it does not depend on the other points."""
    target: Target
    num_params: int
    memory_gib: float
    """Weights and KV cache at the context and batch size of the constraints."""
    decode_ms: float
    """Modeled time of one generated token of each sequence in the batch."""
    shape: ModelShape

    def facts(self) -> dict[str, Any]:
        """Return plain values, for tables and JSON."""
        return {
            "name": self.name,
            "num_params": self.num_params,
            **self.shape.sizes(),
            "memory_gib": round(self.memory_gib, 4),
            "decode_ms": round(self.decode_ms, 4),
        }


def enumerate_candidates(grid: SearchGrid, constraints: SearchConstraints, source: ModelShape) -> list[Candidate]:
    """Return the points of the grid that can be cut out of `source` and meet the constraints, in the grid's order.

    Raises:
        PlanError: there is no such point, there are more than `constraints.max_candidates`, or a factor gives 0.
    """
    found: list[Candidate] = []
    points = 0
    for target in _points(dict(grid), source):
        points += 1
        shape = target_shape(source, target, None)
        if _can_be_cut(shape, source) and _meets(shape, constraints):
            hardware = constraints.hardware
            memory, decode = memory_gib(shape, constraints), decode_ms(shape, constraints, hardware)
            found.append(Candidate(_name(target), target, num_params(shape), memory, decode, shape))
    if not found:
        raise PlanError(
            f"None of the {points} points of the grid can be cut out of the model and meets the constraints.",
            next_step="Extend the grid, or raise constraints.num_params_tolerance.",
        )
    if len(found) > constraints.max_candidates:
        raise PlanError(
            f"{len(found)} of the {points} points of the grid meet the constraints.",
            allowed=f"at most {constraints.max_candidates}",
            next_step="Narrow the grid or the constraints, or raise max_candidates.",
        )
    return found


def _name(target: Target) -> str:
    sizes = {axis.letter: getattr(target, axis.target_key) for axis in (LAYERS, *WIDTH_AXES)}
    return "_".join(f"{letter}{size}" for letter, size in sizes.items() if size is not None)


def _points(grid: Mapping[str, Sequence[float]], source: ModelShape) -> Iterator[Target]:
    last = (HIDDEN.target_key, FFN.target_key)
    others = [key for key in source.sizes() if key in TARGET_KEYS and key not in last]
    choices: list[list[int | None]] = [[int(size) for size in grid.get(key, ())] or [None] for key in others]
    for chosen in product(*choices):
        for hidden in grid.get(HIDDEN.target_key, ()) or (source.hidden_size,):
            for ffn in _ffn_sizes(grid, int(hidden), source):
                sizes = dict(zip(others, chosen, strict=True))
                yield Target(**sizes, **{last[0]: int(hidden), last[1]: ffn})


def _ffn_sizes(grid: Mapping[str, Sequence[float]], hidden: int, source: ModelShape) -> Sequence[int]:
    expansion = grid.get(FFN_EXPANSION, ())
    if expansion:
        return list(dict.fromkeys(expanded_size(factor, hidden) for factor in expansion))
    return [int(size) for size in grid.get(FFN.target_key, ())] or [source.ffn_hidden_size]


def expanded_size(factor: float, hidden: int) -> int:
    """Return the number of MLP neurons of a factor in `ffn_expansion`.

    Raises:
        PlanError: it is 0.
    """
    size = round(factor * hidden)
    if size == 0:
        raise PlanError(
            f"{FFN_EXPANSION} has {factor:g}: times hidden_size {hidden} it is rounded to 0 neurons.",
            allowed=f"at least {1 / hidden:.2g}",
        )
    return size


def _can_be_cut(shape: ModelShape, source: ModelShape) -> bool:
    fits = all(size <= source.sizes()[key] for key, size in shape.sizes().items())
    whole = shape.num_attention_heads % shape.num_query_groups == 0
    return fits and whole and shape.heads_per_group <= source.heads_per_group


def _meets(shape: ModelShape, constraints: SearchConstraints) -> bool:
    least, most = constraints.num_params_range
    if not least <= num_params(shape) <= most:
        return False
    if constraints.max_memory_gib is not None and memory_gib(shape, constraints) > constraints.max_memory_gib:
        return False
    limit = constraints.max_decode_ms
    return limit is None or decode_ms(shape, constraints, constraints.hardware) <= limit


def kv_cache_bytes(shape: ModelShape, constraints: SearchConstraints) -> int:
    """Return the size of the keys and values of all layers, for the full context of each sequence, 16 bits each."""
    per_token = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * 2
    return per_token * constraints.context_tokens * constraints.batch_size


def memory_gib(shape: ModelShape, constraints: SearchConstraints) -> float:
    """Return the size of 16-bit weights and the KV cache."""
    return (2 * num_params(shape) + kv_cache_bytes(shape, constraints)) / GIB


def decode_ms(shape: ModelShape, constraints: SearchConstraints, hardware: Hardware) -> float:
    """Return the roofline time of one decoding step of the batch: reading or computing, whichever takes longer.

    Reading: all 16-bit weights except for the embeddings, and the KV cache, once. Computing: 2 operations for each
    weight and sequence. Each layer adds a fixed cost (kernel launches), which makes fewer layers faster than narrower
    ones.
    """
    embeddings = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
    weights = num_params(shape) - embeddings
    read_s = (2 * weights + kv_cache_bytes(shape, constraints)) / (hardware.memory_gb_per_s * 1e9)
    compute_s = 2 * weights * constraints.batch_size / (hardware.tflops * 1e12)
    return 1e3 * max(read_s, compute_s) + 1e-3 * hardware.layer_overhead_us * shape.num_layers


def ranking(candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sort candidates, best first, and add `rank` and `on_pareto_front`.

    A candidate that reached a later rung is better; in the same rung, one with a lower loss. Candidates whose last loss
    is NaN, or None because they were too slow to be trained or diverged, are the last of all.
    """

    def order(found: Mapping[str, Any]) -> tuple[bool, int, float, str]:
        loss = _orderable(found["losses"][-1])
        return loss == math.inf, -len(found["losses"]), loss, found["name"]

    ordered = sorted(candidates, key=order)
    return [
        {**found, "rank": number, "on_pareto_front": _on_front(found, ordered)}
        for number, found in enumerate(ordered, 1)
    ]


def _orderable(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss


def _on_front(one: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether no other is at least as small and as good, and better in one of the two."""

    def dominates(other: Mapping[str, Any]) -> bool:
        mine, theirs = ((c["num_params"], _orderable(c["losses"][-1])) for c in (one, other))
        return theirs != mine and theirs[0] <= mine[0] and theirs[1] <= mine[1]

    return not any(dominates(other) for other in others)


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two orders, from -1 to 1; None if it is undefined, as for a constant sequence."""
    from scipy import stats

    tau = float(stats.kendalltau(one, other).statistic) if len(one) > 1 else math.nan
    return None if math.isnan(tau) else tau


def write_search(document: Mapping[str, Any], folder: Path) -> None:
    """Write search.json."""
    (folder / SEARCH_FILE).write_text(json.dumps({"schema": SCHEMA, **document}, indent=2) + "\n", encoding="utf-8")


def read_search(folder: Path) -> dict[str, Any]:
    """Read search.json of a finished search.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        document = json.loads((folder / SEARCH_FILE).read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA or not document["candidates"]:
            raise ValueError("not a search result of this version")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"The search result cannot be read: {error!r}",
            where=str(folder / SEARCH_FILE),
        ) from error
    return dict(document)


def winner_of(folder: Path) -> Target:
    """Return the sizes of the best candidate."""
    best = read_search(folder)["candidates"][0]
    return Target(**{key: best[key] for key in TARGET_KEYS})
