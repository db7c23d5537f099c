"""Figures of the report as inline SVG.

Colors are CSS variables of the page, so that one figure works in light and dark mode. matplotlib does not support
variables; it draws in placeholder colors, which are replaced in the finished SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape

from nemo_minitron.report.comparison import is_lower_better, score_of, task_metrics

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

_MODELS = ("teacher", "distilled", "pruned", "random")
"""Labels with a color of their own."""
_EXTRAS = ("extra", "extra2", "extra3", "extra4")
"""Colors of models with other labels."""
_VARIABLES = ("ink", "soft", "line", "card", *_MODELS, *_EXTRAS, "cut")
STAND_INS = {name: f"#0101{number:02x}" for number, name in enumerate(_VARIABLES, 16)}
"""Name of a CSS variable of the page -> placeholder color for matplotlib."""
INK, SOFT, LINE, CARD, CUT = (STAND_INS[name] for name in ("ink", "soft", "line", "card", "cut"))
TEACHER, DISTILLED, PRUNED = (STAND_INS[name] for name in ("teacher", "distilled", "pruned"))
MARKERS = "os^Dv"
HALF, WIDE, SLIM = 4.6, 6.4, 3.2
"""Widths in inches of a figure in a row of two, of one, and of three figures."""
_POINT_DISTANCE = 0.1
"""Distance in inches of the points of two models on one task."""
_LEGEND_CHARACTERS = 72
"""Characters that fit into a row of a legend above a wide figure."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo-minitron",
    "font.size": 9,
    # Users choose the names of models and tasks; a dollar sign in one does not begin a formula.
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.color": LINE,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "path.simplify": True,
}


def looks_of(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return label of a model -> (CSS variable with its color, its marker); markers differ where colors repeat."""
    listed = list(labels)
    others = {label: number for number, label in enumerate(label for label in listed if label not in _MODELS)}
    looks = {}
    for label in listed:
        round_number, color = divmod(others.get(label, 0), len(_EXTRAS))
        looks[label] = (_EXTRAS[color] if label in others else label, MARKERS[round_number % len(MARKERS)])
    return looks


@contextmanager
def picture(out: list[str], name: str, width: float, height: float, alt: str) -> Iterator[Axes]:
    """Provide axes to draw on, and append the finished SVG to `out`."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height))
        try:
            yield axes
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        finally:
            plt.close(figure)
    out.append(_as_part_of_page(stream.getvalue(), name, alt))


def _as_part_of_page(svg: str, name: str, alt: str) -> str:
    """Make an SVG part of the page: unique ids, the fonts and colors of the page, an alternative text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id="|href="#)|(url\(#)', lambda found: f"{found[0]}{name}-", svg)
    svg = re.sub(r"font(-family)?: [^;\"]*?(?=sans-serif)sans-serif", _inherit_font, svg)
    for variable, color in STAND_INS.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _inherit_font(found: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", found[0])
    return f"font-size: {size[0]}; font-family: inherit" if size else "font-family: inherit"


def quality_bars(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the bits per byte of each model; lower is better."""
    values = {label: model["bits_per_byte"] for label, model in models.items()}
    return _bars("quality", values, "bits per byte on held-out text, lower is better", "{:.3f}")


def size_bars(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the number of parameters of each model."""
    counts = {label: model["num_params"] for label, model in models.items()}
    unit, name = next(
        (unit, name)
        for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (0, ""))
        if max(counts.values()) >= unit
    )
    values = {label: count / (unit or 1) for label, count in counts.items()}
    return _bars("size", values, f"{name} parameters".strip(), "{:,.2f}" if unit == 1e9 else "{:,.1f}")


def speed_bars(speed: Mapping[str, Any], labels: Sequence[str], rate: str, title: str) -> str:
    """Plot the tokens per second of each model that was timed, with its slowest and fastest round."""
    models = {label: speed["models"][label] for label in labels if label in speed["models"]}
    key = f"{rate}_tokens_per_s"
    spread = {label: (rates[f"{key}_min"], rates[f"{key}_max"]) for label, rates in models.items()}
    values = {label: rates[key] for label, rates in models.items()}
    form = "{:,.0f}" if min(values.values()) >= 100 else "{:,.1f}"
    return _bars(f"speed-{rate}", values, title, form, spread, labels)


def _bars(
    name: str,
    values: Mapping[str, float],
    xlabel: str,
    form: str,
    spread: Mapping[str, tuple[float, float]] | None = None,
    every: Iterable[str] | None = None,
) -> str:
    """Plot a bar for each label; `every` are the labels of all models of the report, which decide on the colors."""
    out: list[str] = []
    labels, looks = list(values)[::-1], looks_of(values if every is None else every)
    listed = ", ".join(f"{label} {form.format(value)}" for label, value in values.items())
    with picture(out, name, HALF, 0.62 + 0.34 * len(labels), f"{xlabel}: {listed}") as ax:
        colors = [STAND_INS[looks[label][0]] for label in labels]
        rows = range(len(labels))
        ax.barh(rows, [values[label] for label in labels], color=colors, height=0.6)
        ends = []
        for row, label in enumerate(labels):
            low, high = (spread or {}).get(label, (values[label], values[label]))
            if high > low:
                ax.plot([low, high], [row, row], color=INK, linewidth=1.1, solid_capstyle="butt")
            ends.append(high)
            ax.annotate(form.format(values[label]), (high, row), (5, 0), textcoords="offset points", va="center")
        ax.set_yticks(rows, labels)
        ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
        ax.set(xlabel=xlabel, xlim=(0, max(ends) * 1.16))
        ax.spines["left"].set_color(LINE)
        ax.grid(axis="y", visible=False)
    return out[0]


def validation_curve(curves: Sequence[Mapping[str, Any]]) -> str:
    """Plot held-out loss over the tokens of the distillation, with the first loss and the teacher's loss as lines."""
    out: list[str] = []
    x, valid = _validation(curves)
    start, goal = valid[0]["valid_loss"], valid[-1].get("valid_teacher_loss")
    losses = [row["valid_loss"] for row in valid]
    levels = [(start, PRUNED, "pruned, before training")]
    alt = f"Held-out loss falls from {start:.3f} to {losses[-1]:.3f}"
    if goal is not None:
        levels.append((goal, TEACHER, "teacher"))
        alt += f"; the teacher's is {goal:.3f}"
    with picture(out, "validation", HALF, 2.7, f"{alt}.") as ax:
        for level, color, text in levels:
            ax.axhline(level, color=color, linewidth=1.3, linestyle=(0, (4, 2)))
            ax.annotate(text, (1, level), (0, 3), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                        ha="right", color=color)  # fmt: skip
        ax.fill_between(x, losses, start, color=DISTILLED, alpha=0.12, linewidth=0)
        ax.plot(x, losses, color=DISTILLED, marker="o", ms=3.5, linewidth=1.8)
        above = goal is not None and losses[-1] - goal < start - losses[-1]
        ax.annotate(f"{losses[-1]:.2f}", (x[-1], losses[-1]), (0, 7 if above else -14), textcoords="offset points",
                    ha="right", color=DISTILLED, weight="bold")  # fmt: skip
        ax.set(xlabel="thousand tokens of distillation", ylabel="held-out loss, nats per token")
        ax.margins(y=0.12)
    return out[0]


def loss_curve(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Plot training and held-out loss of one alignment stage over its steps."""
    out: list[str] = []
    parts = {key: [(row["step"], row[key]) for row in rows if row[key] is not None] for key in ("train", "valid")}
    last = (parts["valid"] or parts["train"])[-1][1]
    with picture(out, f"align-{name}", HALF, 2.7, f"Loss of {name} over its steps; {last:.3f} at the end.") as ax:
        ax.plot(*zip(*parts["train"], strict=True), color=PRUNED, linewidth=1.2, label="batch")
        if parts["valid"]:
            errors = [row.get("valid_se") or 0.0 for row in rows if row["valid"] is not None]
            steps, losses = zip(*parts["valid"], strict=True)
            ax.errorbar(
                steps, losses, yerr=errors, color=DISTILLED, marker="o", ms=3.5, linewidth=1.6, label="held out"
            )
        ax.set(xlabel=f"steps of {name}", ylabel="loss")
        ax.legend(frameon=False)
    return out[0]


def model_points(name: str, values: Mapping[str, tuple[float, float]], xlabel: str, chance: float | None) -> str:
    """Plot one figure of several models with one standard error, and the value of a guess as a line."""
    out: list[str] = []
    listed = ", ".join(f"{label} {value:.3f} ± {error:.3f}" for label, (value, error) in values.items())
    with picture(out, name, HALF, 0.8 + 0.34 * len(values), f"{xlabel}: {listed}") as ax:
        for row, (value, error) in enumerate(values.values()):
            ax.errorbar(value, row, xerr=error, fmt="o", ms=5, color=DISTILLED, linewidth=1.4)
            ax.annotate(f"{value:.2f}", (value, row), (0, 6), textcoords="offset points", ha="center", color=INK)
        if chance is not None:
            ax.axvline(chance, color=SOFT, linewidth=1.1, linestyle=(0, (4, 2)))
        ax.set_yticks(range(len(values)), list(values))
        ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
        ax.set(xlabel=xlabel, ylim=(len(values) - 0.5, -0.6))
        ax.margins(x=0.1)
        ax.grid(axis="y", visible=False)
    return out[0]


def divergence_curve(curves: Sequence[Mapping[str, Any]]) -> str:
    """Plot KL(teacher || student) on each training batch and on held-out text."""
    out: list[str] = []
    x, valid = _validation(curves)
    held_out = [row["valid_kl"] for row in valid]
    train = [(row["tokens"] / 1e3, row["train_loss"]) for row in curves if "train_loss" in row]
    alt = f"KL to the teacher on held-out text falls from {held_out[0]:.3f} to {held_out[-1]:.3f}."
    with picture(out, "divergence", HALF, 2.7, alt) as ax:
        if train:
            ax.plot(*zip(*train, strict=True), color=SOFT, alpha=0.55, linewidth=0.9, label="training batches")
        ax.plot(x, held_out, color=DISTILLED, marker="o", ms=3.5, linewidth=1.8, label="held-out")
        ax.set(xlabel="thousand tokens of distillation", ylabel="KL to the teacher, nats per token")
        ax.set_ylim(bottom=0)
        ax.legend()
    return out[0]


def _validation(curves: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[Mapping[str, Any]]]:
    """Return (thousands of tokens seen, rows) of the validations."""
    tokens = {row["step"]: row["tokens"] for row in curves if "tokens" in row}
    each = next((count / step for step, count in tokens.items() if step), 0.0)
    rows = [row for row in curves if "valid_loss" in row]
    # The training row of a validation's step may have been thinned out; then estimate its tokens.
    return [tokens.get(row["step"], row["step"] * each) / 1e3 for row in rows], rows


def importance(axis: str, curve: Mapping[str, Any]) -> str:
    """Plot the sorted importance of one axis; the units right of the line were cut."""
    out: list[str] = []
    size, kept, rank, name = curve["size"], curve["kept"], curve["rank"], curve["name"]
    with picture(out, f"importance-{axis}", SLIM, 2.3, f"{name}: {kept} of {size} kept.") as ax:
        if kept < size:
            ax.axvspan(kept + 0.5, size, color=CUT, alpha=0.14, linewidth=0)
            ax.axvline(kept + 0.5, color=CUT, linewidth=1.3, linestyle=(0, (4, 2)))
        if curve["num_layers"] > 1:
            ax.fill_between(rank, curve["low"], curve["high"], color=TEACHER, alpha=0.18, linewidth=0)
        ax.plot(rank, curve["mean"], color=TEACHER, linewidth=1.8)
        kept_text = f"all {size:,} kept" if kept == size else f"{kept:,} of {size:,} kept"
        ax.set_title(f"{name}: {kept_text}")
        ax.set(xlabel="rank", ylabel="importance / median", xlim=(1, max(size, 2)))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _log_scale(ax)
    return out[0]


def _log_scale(ax: Axes) -> None:
    """Set a logarithmic y axis with plain numbers, unless all values are within a factor of five."""
    low, high = ax.dataLim.intervaly
    if high < 5 * low:
        return
    ax.set_yscale("log")
    if low > 0:
        ax.set_ylim(bottom=low / 1.2)
    bottom, top = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top > 100 * bottom else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()


def ffn_map(rows: Sequence[Sequence[float]], curve: Mapping[str, Any]) -> str:
    """Plot the sorted importance of each layer's MLP neurons as a heat map."""
    out: list[str] = []
    size, kept, layers = curve["size"], curve["kept"], len(rows)
    alt = f"Importance of the MLP neurons of {layers} layers, sorted in each."
    with picture(out, "ffn-map", HALF, 2.9, alt) as ax:
        extent = (0, size, layers - 0.5, -0.5)
        # Limit the color range to percentiles, because a few neurons have extreme values.
        low, high = np.percentile(np.array(rows), [1, 97])
        image = ax.imshow(
            rows, aspect="auto", cmap="cividis", extent=extent, interpolation="nearest", vmin=low, vmax=high
        )
        if kept < size:
            ax.axvline(kept, color="white", linestyle=(0, (4, 2)), linewidth=1.4)
        ax.set(xlabel="neurons of a layer, most important first", ylabel="layer")
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid(visible=False)
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=28, extend="max")
        bar.set_label("log10 importance")
        bar.outline.set_visible(False)
    return out[0]


def layer_points(metric: str, values: Sequence[float], kept: Sequence[int], baseline: float | None) -> str:
    """Plot the score of each layer, with dropped layers in another color."""
    out: list[str] = []
    dropped = sorted(set(range(len(values))) - set(kept))
    is_loss = metric == "lm_loss"
    shown = [value - baseline for value in values] if is_loss and baseline is not None else list(values)
    names = {"block_influence": "block influence", "lm_loss": "loss added by removing it, nats"}
    alt = f"{names.get(metric, metric)} of {len(values)} layers; dropped: {dropped or 'none'}."
    with picture(out, f"layers-{metric}", HALF, 2.9, alt) as ax:
        colors = [CUT if layer in dropped else TEACHER for layer in range(len(values))]
        # Dots, not bars: on a logarithmic scale the length of a bar has no meaning.
        ax.scatter(range(len(values)), shown, color=colors, s=22, zorder=3)
        ax.plot(range(len(values)), shown, color=LINE, linewidth=1.2)
        below = "layer (red: dropped)" if dropped else "layer"
        ax.set(xlabel=below, ylabel=names.get(metric, metric))
        if min(shown) > 0 and max(shown) / min(shown) > 30:
            _log_scale(ax)
        ax.grid(axis="x", visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return out[0]


def share_by_layer(name: str, lines: Mapping[str, Sequence[tuple[int, float]]], alt: str) -> str:
    """Plot shares against the layers of the student, a line of its own color and marker for each name."""
    out: list[str] = []
    with picture(out, name, WIDE, 2.9, alt) as ax:
        looks = zip((TEACHER, DISTILLED, PRUNED, SOFT), "os^D", strict=True)
        for (label, points), (color, marker) in zip(lines.items(), looks, strict=False):
            ax.plot(*zip(*points, strict=True), color=color, marker=marker, ms=3.5, linewidth=1.2, label=label)
        ax.set(xlabel="layer of the student", ylim=(0, None))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(fontsize=8)
    return out[0]


def plotted_metrics(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return task -> metric of the tasks in the figure: those of which a higher score is better."""
    return {task: metric for task, metric in task_metrics(models).items() if not is_lower_better(task, metric, models)}


def task_points(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the score of each model on each task, with one standard error."""
    out: list[str] = []
    metrics, looks = plotted_metrics(models), looks_of(models)
    columns = max(1, min(len(looks), _LEGEND_CHARACTERS // (4 + max(map(len, looks)))))
    row_height = max(0.52, _POINT_DISTANCE * (len(looks) + 1))
    height = 0.65 + 0.2 * -(-len(looks) // columns) + row_height * len(metrics)
    with picture(out, "tasks", WIDE, height, "Scores on downstream tasks; see the table.") as ax:
        for row, (task, metric) in enumerate(metrics.items()):
            ax.axhline(row + 0.5, color=LINE, linewidth=0.7)
            for number, (label, (variable, marker)) in enumerate(looks.items()):
                found = score_of(task, models[label], metric)
                if found is not None:
                    place = row + (number - (len(looks) - 1) / 2) * _POINT_DISTANCE / row_height
                    color = STAND_INS[variable]
                    ax.errorbar(found[0], place, xerr=found[1], fmt=marker, ms=4.5, color=color, linewidth=1.4)
        handles = [ax.plot([], [], marker, ms=5, color=STAND_INS[variable])[0] for variable, marker in looks.values()]
        ax.set_yticks(range(len(metrics)), [f"{task}\n{metric}" for task, metric in metrics.items()])
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.set_ylim(len(metrics) - 0.5, -0.5)
        ax.set_xlabel("score ± one standard error")
        ax.grid(axis="y", visible=False)
        # Labels in a list are shown even if they begin with an underscore.
        ax.legend(handles, list(looks), ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0), handletextpad=0.1)
    return out[0]
