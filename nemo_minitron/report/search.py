"""Report section on a search: its texts and table, shared by all forms of the report, and its two figures.

The facts have the form written by the search: candidates sorted by rank, and `losses` with one entry for each rung
that a candidate took part in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from nemo_minitron.families.shape import SIZE_COLUMNS
from nemo_minitron.report.figures import CARD, DISTILLED, HALF, INK, SOFT, TEACHER, picture
from nemo_minitron.report.text import millions, plain, table

Candidate = Mapping[str, Any]
Search = Mapping[str, Any]
_HEIGHT = 3.1
_NEAREST_TICKS = 0.07
"""Smallest distance of two tick labels, as a share of the axis; closer ones would touch each other."""
_Place = tuple[float, float, str]
_BESIDE: tuple[_Place, ...] = ((7, 0, "left"), (7, 6, "left"), (7, -6, "left"))
_AROUND: tuple[_Place, ...] = (
    *_BESIDE,
    *((-right, up, "right") for right, up, _ in _BESIDE),
    (0, 11, "center"),
    (0, -11, "center"),
)
"""Offsets for the name of a point, the best first: (points to the right, points up, alignment)."""

# Keeps a name readable on top of a line. An outline of the letters would do the same, but turns text into curves.
_BEHIND: dict[str, Any] = {"facecolor": CARD, "linewidth": 0, "alpha": 0.8, "pad": 0.3}


# --- texts --------------------------------------------------------------------------------------


def search_markdown(search: Search) -> str:
    """Return the section as Markdown: sentence, table and notes."""
    header, rows = search_table(search)
    names = [candidate["name"] for candidate in search["candidates"]]
    body = [
        [f"**{plain(cell)}**" if name == search["winner"] and cell else plain(cell) for cell in row]
        for name, row in zip(names, rows, strict=True)
    ]
    return "\n\n".join([plain(sentence(search)), table(header, body), *map(plain, notes(search))])


def sentence(search: Search) -> str:
    """Return a sentence on the winner, its training, and how well the zero-shot order predicted the final one."""
    best, rungs, candidates = winner(search), len(search["rungs"]), len(search["candidates"])
    steps = _steps_of(best, search)
    parts = [
        f"{best['name']} wins: loss {last_loss(best):.2f} "
        + (f"after {_count(steps, 'step')}" if steps else "untrained"),
        f"{_count(candidates, 'candidate')}, {_count(rungs, 'rung')}",
    ]
    tau = search["rank_correlation"]
    if tau is not None:
        verb = "agree" if tau > 0 else "do not agree"
        parts.append(f"zero-shot order and final order {verb}, Kendall tau {tau:.2f}")
    return "; ".join(parts) + "."


def notes(search: Search) -> list[str]:
    """Return sentences on the constraints, the meaning of the columns and the Pareto front."""
    limits = search["constraints"]
    front = ", ".join(candidate["name"] for candidate in _front(search))
    sequences = _count(limits["batch_size"], "sequence")
    out = [
        f"Memory: weights and the KV cache of {sequences} of {limits['context_tokens']:,} tokens. Memory and decode "
        "time are modeled. Losses are nats per token on held-out text.",
    ]
    constraints = _constraints(limits)
    if constraints:
        out.insert(0, f"Constraints: {'; '.join(constraints)}.")
    if front:
        out.append(f"Pareto front, where no other candidate is both smaller and better: {front}.")
    return out


def _constraints(limits: Mapping[str, Any]) -> list[str]:
    size, tolerance = limits["num_params"], limits["num_params_tolerance"]
    out = []
    if size is not None:
        out.append(f"{millions(size)} parameters" + (f" within {100 * tolerance:g} %" if tolerance else ""))
    for key, form in (
        ("num_params_min", "at least {} parameters"),
        ("num_params_max", "at most {} parameters"),
    ):
        if limits[key] is not None:
            out.append(form.format(millions(limits[key])))
    if limits["max_memory_gib"] is not None:
        out.append(f"at most {limits['max_memory_gib']:g} GiB of memory")
    if limits["max_decode_ms"] is not None:
        out.append(f"at most {limits['max_decode_ms']:g} ms for a generated token")
    return out


def search_table(search: Search) -> tuple[list[str], list[list[str]]]:
    """Return (header, one row for each candidate, by rank). Speed has a column only if it was measured."""
    timed = any(candidate["generate_tokens_per_s"] is not None for candidate in search["candidates"])
    sizes = ["/".join(axis.name for axis in column) for column in SIZE_COLUMNS]
    header = ["rank", "name", *sizes, "parameters", "memory, GiB", "decode, ms"]
    header += [*(["tokens/s"] if timed else []), "zero-shot loss", "steps", "final loss"]
    return header, [_row(candidate, search, timed) for candidate in search["candidates"]]


def _row(candidate: Candidate, search: Search, timed: bool) -> list[str]:
    speed = [_number(candidate["generate_tokens_per_s"], "{:,.1f}")] if timed else []
    return [
        str(candidate["rank"]),
        str(candidate["name"]),
        *("/".join(f"{candidate[axis.target_key]:,}" for axis in column) for column in SIZE_COLUMNS),
        millions(candidate["num_params"]),
        _number(candidate["memory_gib"], "{:,.2f}"),
        _number(candidate["decode_ms"], "{:,.2f}"),
        *speed,
        _number(candidate["zero_shot_loss"], "{:.3f}"),
        f"{_steps_of(candidate, search):,}" if _was_trained(candidate) else "",
        _outcome(candidate),
    ]


def _outcome(candidate: Candidate) -> str:
    if _was_trained(candidate):
        return f"{last_loss(candidate):.3f}"
    # Searches of older versions ended with a candidate that diverged.
    return "diverged" if candidate.get("diverged") else "too slow"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def winner(search: Search) -> Candidate:
    """Return the winning candidate."""
    return next(candidate for candidate in search["candidates"] if candidate["name"] == search["winner"])


def last_loss(candidate: Candidate) -> float:
    """Return the loss after the candidate's last rung; the zero-shot loss if it took part in none."""
    return float([candidate["zero_shot_loss"], *candidate["losses"]][-1])


def _was_trained(candidate: Candidate) -> bool:
    """Return whether the candidate was fast enough to be trained and did not diverge."""
    return candidate["losses"][-1:] != [None]


def _trained(search: Search) -> list[Candidate]:
    return [candidate for candidate in search["candidates"] if _was_trained(candidate)]


def _steps(search: Search) -> list[int]:
    """Return the cumulative training steps before the first rung and after each."""
    return [0, *accumulate(rung["num_steps"] for rung in search["rungs"])]


def _steps_of(candidate: Candidate, search: Search) -> int:
    return _steps(search)[len(candidate["losses"])]


def _front(search: Search) -> list[Candidate]:
    """Return the candidates on the Pareto front, from the smallest to the largest."""
    front = [found for found in search["candidates"] if found["on_pareto_front"] and _was_trained(found)]
    return sorted(front, key=lambda candidate: candidate["num_params"])


# --- figures ------------------------------------------------------------------------------------


def pareto(search: Search) -> str:
    """Plot held-out loss over size; candidates that were dropped early, and so trained less, are lighter."""
    out: list[str] = []
    best, front, candidates = winner(search), _front(search), _trained(search)
    unit, name = (1e9, "billion") if best["num_params"] >= 1e9 else (1e6, "million")
    rungs = len(search["rungs"])
    others = [candidate for candidate in candidates if candidate is not best]
    alt = (
        f"Loss over parameters of {len(candidates)} candidates; on the front: {_names(front)}; winner: {best['name']}."
    )
    with picture(out, "search-pareto", HALF, _HEIGHT, alt) as ax:
        if len(front) > 1:
            ax.plot(*zip(*_stairs(front, unit), strict=True), color=INK, linewidth=1.1, zorder=2)
        for taken in sorted({len(candidate["losses"]) for candidate in others}):
            group = [candidate for candidate in others if len(candidate["losses"]) == taken]
            full = taken == rungs
            shade = 1.0 if full else 0.25 + 0.35 * taken / max(rungs, 1)
            steps = _count(_steps(search)[taken], "step")
            ax.scatter(*_points(group, unit), color=TEACHER, alpha=shade, s=34, linewidths=0, label=steps, zorder=3)
        ax.scatter(*_points([best], unit), color=DISTILLED, s=72, linewidths=0, zorder=3, label="winner")
        ax.scatter(*_points(front, unit), facecolors=CARD, edgecolors=INK, s=95, linewidths=1.1, zorder=2.5,
                   label="Pareto front")  # fmt: skip
        ax.set(xlabel=f"{name} parameters", ylabel="held-out loss, nats per token")
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.margins(0.14, 0.14)
        _legend(ax)
        order = [best, *front, *others]
        points = {candidate["name"]: _point(candidate, unit) for candidate in order}
        _write_names(ax, points, best["name"], _AROUND, _stairs(front, unit))
    return out[0]


def ladder(search: Search) -> str:
    """Plot held-out loss over training steps, one line for each candidate up to its last rung."""
    out: list[str] = []
    best, steps = winner(search), _steps(search)
    alt = f"Held-out loss of {best['name']}, the winner: " + ", ".join(
        f"{loss:.2f} after {_count(at, 'step')}" for at, loss in zip(steps, _losses(best), strict=False)
    )
    with picture(out, "search-ladder", HALF, _HEIGHT, alt) as ax:
        others = [candidate for candidate in _trained(search) if candidate is not best]
        for candidate in others:
            losses = _losses(candidate)
            ax.plot(steps[: len(losses)], losses, color=SOFT, alpha=0.6, marker="o", ms=3, linewidth=1.1, clip_on=False)
        losses = _losses(best)
        ax.plot(steps[: len(losses)], losses, color=DISTILLED, marker="o", ms=4.5, linewidth=2, zorder=3, clip_on=False)
        ax.set(xlabel="training steps (square root); 0: as cut, zero-shot", ylabel="held-out loss, nats per token")
        # Each rung is a few times as long as the one before; on a linear axis the first would be very narrow.
        ax.set_xscale("function", functions=(lambda at: np.sqrt(np.maximum(at, 0)), np.square))
        ax.set_xticks(_ticks(steps))
        ax.margins(y=0.08)
        # Leave space for the names of the candidates that reached the end.
        ax.set_xlim(0, max(1, steps[-1]) * 1.4)
        # Place the winner's name first; where lines end close together, names without space are left out.
        ends = {c["name"]: (steps[len(c["losses"])], last_loss(c)) for c in [best, *others]}
        _write_names(ax, ends, best["name"], _BESIDE)
    return out[0]


def _losses(candidate: Candidate) -> list[float]:
    return [candidate["zero_shot_loss"], *candidate["losses"]]


def _names(candidates: Sequence[Candidate]) -> str:
    return ", ".join(candidate["name"] for candidate in candidates)


def _point(candidate: Candidate, unit: float) -> tuple[float, float]:
    return candidate["num_params"] / unit, last_loss(candidate)


def _points(candidates: Sequence[Candidate], unit: float) -> tuple[list[float], list[float]]:
    points = [_point(candidate, unit) for candidate in candidates]
    return [x for x, _ in points], [y for _, y in points]


def _stairs(front: Sequence[Candidate], unit: float) -> list[tuple[float, float]]:
    """Return the points of the front as steps, not slopes, because there may be no shapes between two candidates."""
    points = [_point(candidate, unit) for candidate in front]
    corners = [((right, high), (right, low)) for (_, high), (right, low) in pairwise(points)]
    return [*points[:1], *(corner for pair in corners for corner in pair)]


def _legend(ax: Axes) -> None:
    """Put the legend above the axes, where no point can be."""
    marks, _ = ax.get_legend_handles_labels()
    ax.legend(ncols=min(len(marks), 4), loc="lower left", bbox_to_anchor=(0, 1.0), handletextpad=0.1, columnspacing=1.0,
              borderaxespad=0.2, fontsize=8)  # fmt: skip


def _ticks(steps: Sequence[int]) -> list[int]:
    """Choose tick labels that do not touch each other: the first, then from the last backward."""
    places = {step: math.sqrt(step) for step in steps}
    least = _NEAREST_TICKS * places[steps[-1]]
    kept: list[int] = []
    for step in reversed(steps[1:]):
        if places[step] >= least and (not kept or places[kept[-1]] - places[step] >= least):
            kept.append(step)
    return [steps[0], *kept[::-1]]


def _write_names(
    ax: Axes,
    points: Mapping[str, tuple[float, float]],
    best: str,
    places: Sequence[_Place],
    line: Sequence[tuple[float, float]] = (),
) -> None:
    """Write names beside their points, in the given order, where they cover no point, no other name and no line."""
    # Compute the layout, so that positions on the canvas are known.
    assert isinstance(ax.figure, Figure)
    ax.figure.draw_without_rendering()
    taken = [_marker_box(ax, x, y) for x, y in points.values()]
    taken += [Bbox(ax.transData.transform(ends)).padded(1) for ends in pairwise(line)]
    for name, (x, y) in points.items():
        own = _marker_box(ax, x, y)
        others = [box for box in taken if box.bounds != own.bounds]
        for label in _labels(ax, name, (x, y), name == best, places):
            box = label.get_window_extent()
            inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1
            # A name outside of the axes would shrink them; only the winner's may be there.
            if (inside or name == best) and box.count_overlaps(others) == 0:
                taken.append(box)
                break
            label.remove()


def _labels(
    ax: Axes, name: str, point: tuple[float, float], best: bool, places: Sequence[_Place]
) -> Iterator[Annotation]:
    """Yield the label at each of the places in turn."""
    color, weight = (DISTILLED, "bold") if best else (INK, "normal")
    for right, up, align in places:
        label = ax.annotate(name, point, (right, up), textcoords="offset points", ha=align, va="center", fontsize=8,
                            color=color, weight=weight, zorder=4, bbox=_BEHIND)  # fmt: skip
        yield label


def _marker_box(ax: Axes, x: float, y: float) -> Bbox:
    """Return the box on the canvas that the marker of a point covers."""
    center, radius = ax.transData.transform((x, y)), 4.5 * ax.figure.dpi / 72
    return Bbox([center - radius, center + radius])
