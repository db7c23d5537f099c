"""Pictures of the report as inline SVG: transparent, in colours that work on light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

INK = "#7b8290"
"""Text and axes: readable on white and on near-black."""
# Okabe-Ito, safe for colour-blind readers.
COLORS = {"teacher": "#56B4E9", "distilled": "#009E73", "pruned": "#E69F00", "random": "#CC79A7"}
SPARE = ("#0072B2", "#D55E00", "#F0E442")
MUTED = "#b9bec8"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo-minitron",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def color_of(label: str, labels: Sequence[str] = ()) -> str:
    """One colour for one model on every picture."""
    others = [name for name in labels if name not in COLORS]
    return COLORS.get(label) or (SPARE[others.index(label) % len(SPARE)] if label in others else MUTED)


@contextmanager
def _figure(out: list[str], width: float, height: float, columns: int = 1) -> Iterator[list[Axes]]:
    """Axes to draw on; the finished SVG is appended to `out`."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
        yield list(axes[0])
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = stream.getvalue()
    out.append(svg[svg.index("<svg") :])


def quality_bars(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Bits per byte of every model; shorter is better."""
    out: list[str] = []
    labels = list(models)[::-1]
    with _figure(out, 9.2, 0.6 + 0.36 * len(labels)) as (ax,):
        values = [models[label]["bits_per_byte"] for label in labels]
        bars = ax.barh(labels, values, color=[color_of(label, labels) for label in labels], height=0.62)
        ax.bar_label(bars, [f"{value:.3f}" for value in values], padding=4, color=INK)
        ax.set_xlabel("bits per byte on held-out text (lower is better)")
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.12)
    return out[0]


def recovery(curves: Sequence[Mapping[str, Any]]) -> str:
    """Held-out loss and KL over the tokens of the distillation."""
    out: list[str] = []
    tokens = {row["step"]: row["tokens"] for row in curves if "tokens" in row}
    valid = [row for row in curves if "valid_kl" in row]
    x = [tokens.get(row["step"], 0) / 1e3 for row in valid]
    train = [(row["tokens"] / 1e3, row["train_loss"]) for row in curves if "train_loss" in row]
    with _figure(out, 9.2, 3.1, columns=2) as (left, right):
        left.axhline(valid[0]["valid_teacher_loss"], color=COLORS["teacher"], linestyle="--", label="teacher")
        left.axhline(valid[0]["valid_loss"], color=COLORS["pruned"], linestyle="--", label="pruned, before")
        left.plot(
            x, [row["valid_loss"] for row in valid], color=COLORS["distilled"], marker="o", ms=3.5, label="student"
        )
        left.set(xlabel="thousand tokens", ylabel="held-out loss, nats per token")
        left.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93))
        if train:
            right.plot(*zip(*train, strict=True), color=MUTED, linewidth=1, label="training batches")
        right.plot(
            x, [row["valid_kl"] for row in valid], color=COLORS["distilled"], marker="o", ms=3.5, label="held-out"
        )
        right.set(xlabel="thousand tokens", ylabel="KL(teacher || student), nats per token")
        right.set_ylim(bottom=0)
        right.legend()
    return out[0]


def importance_curves(scores: Mapping[str, NDArray[np.float32]], kept: Mapping[str, int]) -> str:
    """Sorted importance of each width axis, relative to its best; what is left of the line stays."""
    out: list[str] = []
    axes = [axis for axis in ("hidden", "ffn", "heads") if axis in scores]
    with _figure(out, 9.2, 2.8, columns=len(axes)) as panels:
        for ax, axis in zip(panels, axes, strict=True):
            rows = np.atleast_2d(scores[axis])
            ordered = -np.sort(-rows, axis=1) / rows.max(axis=1, keepdims=True)
            for row in ordered:
                ax.plot(row, color=COLORS["teacher"], alpha=0.25 if len(rows) > 1 else 1.0, linewidth=1)
            if len(rows) > 1:
                ax.plot(ordered.mean(0), color=SPARE[0], linewidth=2)
            size = rows.shape[1]
            if kept[axis] < size:
                ax.axvline(kept[axis] - 0.5, color=SPARE[1], linestyle="--")
                ax.axvspan(kept[axis] - 0.5, size - 1, color=SPARE[1], alpha=0.08, linewidth=0)
            ax.set_title(f"{axis}: {kept[axis]} of {size} kept", fontsize=10)
            ax.set(yscale="log", xlabel="rank")
        panels[0].set_ylabel("importance / best")
    return out[0]


def ffn_map(ffn_LF: NDArray[np.float32], kept: int) -> str:
    """Sorted MLP importance of every layer: where the neurons that matter are."""
    out: list[str] = []
    ordered = -np.sort(-ffn_LF, axis=1)
    columns = np.array([chunk.mean(1) for chunk in np.array_split(ordered, min(96, ordered.shape[1]), axis=1)])
    with _figure(out, 9.2, 3.0) as (ax,):
        image = ax.pcolormesh(
            np.linspace(0, ffn_LF.shape[1], len(columns) + 1), np.arange(len(ffn_LF) + 1), np.log10(columns.T + 1e-12)
        )
        image.set_rasterized(True)
        ax.axvline(kept, color="white", linestyle="--", linewidth=1.2)
        ax.set(xlabel="neurons, most important first (kept: left of the line)", ylabel="layer")
        ax.grid(visible=False)
        ax.figure.colorbar(image, ax=ax, label="log10 importance")
    return out[0]


def layer_bars(scores: Mapping[str, NDArray[np.float32]], kept: Sequence[int]) -> str:
    """Score of each layer; dropped ones marked."""
    out: list[str] = []
    metrics = {"layers.block_influence": "block influence", "layers.lm_loss": "loss without the layer, nats per token"}
    present = [name for name in metrics if name in scores]
    with _figure(out, 9.2, 2.6, columns=len(present)) as panels:
        for ax, name in zip(panels, present, strict=True):
            values = scores[name]
            colors = [COLORS["teacher"] if layer in kept else SPARE[1] for layer in range(len(values))]
            ax.bar(range(len(values)), values, color=colors)
            ax.set(
                xlabel="layer (dropped ones in orange)" if len(kept) < len(values) else "layer", ylabel=metrics[name]
            )
            if name == "layers.lm_loss":
                ax.set(yscale="log")
    return out[0]


def task_points(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy of every model on every task, with one standard error."""
    out: list[str] = []
    labels = list(models)
    tasks = list(dict.fromkeys(task for model in models.values() for task in model["tasks"]))
    with _figure(out, 9.2, 0.9 + 0.55 * len(tasks)) as (ax,):
        for offset, label in enumerate(labels):
            for row, task in enumerate(tasks):
                found = models[label]["tasks"].get(task, {})
                metric = "acc_norm" if "acc_norm" in found else "acc"
                if metric in found:
                    ax.errorbar(
                        found[metric],
                        row + (offset - (len(labels) - 1) / 2) * 0.18,
                        xerr=found.get(f"{metric}_stderr", 0.0),
                        fmt="o",
                        ms=5,
                        color=color_of(label, labels),
                        label=label if row == 0 else None,
                    )
        ax.set_yticks(range(len(tasks)), tasks)
        ax.invert_yaxis()
        ax.set_xlabel("accuracy (length-normalised where the task has it), ± 1 standard error")
        ax.legend(ncols=len(labels), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return out[0]


def time_bars(stages: Sequence[Mapping[str, Any]]) -> str:
    """Where the time went."""
    out: list[str] = []
    shown = [stage for stage in stages if stage["wall_s"] >= 0.5][::-1]
    with _figure(out, 9.2, 0.6 + 0.26 * len(shown)) as (ax,):
        bars = ax.barh(
            [stage["stage"] for stage in shown], [stage["wall_s"] for stage in shown], color=COLORS["teacher"]
        )
        ax.bar_label(bars, [f"{stage['wall_s']:.0f} s" for stage in shown], padding=4, color=INK)
        ax.set_xlabel("seconds")
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.1)
    return out[0]
