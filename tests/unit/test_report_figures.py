"""Figures of reports with many models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from nemo_minitron.report import figures

LABELS = ["teacher", "distilled", "a", "b", "c", "d", "e", "f", "_g"]
TASKS = ("arc_easy", "sciq", "piqa")


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """Collect the axes of all figures, which are not written."""
    found: list[Axes] = []

    @contextmanager
    def keep(out: list[str], name: str, width: float, height: float, alt: str) -> Iterator[Axes]:
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        found.append(axes)
        yield axes
        figure.canvas.draw()
        plt.close(figure)
        out.append("")

    monkeypatch.setattr(figures, "picture", keep)
    return found


def _model() -> dict[str, Any]:
    return {"tasks": {task: {"acc": 0.5, "acc_stderr": 0.01} for task in TASKS}}


@pytest.mark.parametrize("count", [1, 4, 7, 9])
def test_the_points_of_a_task_stay_in_its_row_and_apart(count: int, axes: list[Axes]) -> None:
    figures.task_points({label: _model() for label in LABELS[:count]})
    (plot,) = axes
    places = [float(container.lines[0].get_ydata()[0]) for container in plot.containers]  # type: ignore[attr-defined]
    inches = plot.get_window_extent().height / plot.get_figure().dpi / len(TASKS)  # type: ignore[union-attr]
    for row in range(len(TASKS)):
        own = places[row * count : (row + 1) * count]
        assert all(abs(place - row) < 0.48 for place in own)
        assert all((after - before) * inches > 0.08 for before, after in pairwise(own))


def test_every_model_is_in_the_legend_with_a_look_of_its_own(axes: list[Axes]) -> None:
    figures.task_points({label: _model() for label in LABELS})
    legend = axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == LABELS
    looks = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
    assert len(looks) == len(LABELS)
    box, whole = legend.get_window_extent(), axes[0].get_figure().bbox  # type: ignore[union-attr]
    assert whole.x0 <= box.x0
    assert box.x1 <= whole.x1


def test_a_model_has_one_color_in_all_figures() -> None:
    assert figures.looks_of(["teacher", "a", "b"])["b"] == figures.looks_of(["a", "teacher", "b", "c"])["b"]
    assert len({variable for variable, _ in figures.looks_of(LABELS[:6]).values()}) == 6
