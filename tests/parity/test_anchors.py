"""Anchors inside the layers: the gradients of a plain formula in every parallel layout, and a whole training."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.losses import AnchorLoss, HiddenLoss, Loss
from tests.support.distributed import run_ranks
from tests.support.tiny_layers import (
    ANCHORED,
    DEPTHS,
    anchor_gradients,
    anchor_rows,
    layer_folders,
    plain_anchor_gradients,
)

LAYOUTS = {
    "one process": Parallel(),
    "tp2": Parallel(tp=2),
    "tp2 with sequence parallel": Parallel(tp=2, micro_batch_size=2, sequence_parallel=True),
    "pp2": Parallel(pp=2),
    "tp2 pp2 with sequence parallel": Parallel(tp=2, pp=2, sequence_parallel=True),
    "dp2": Parallel(dp=2, micro_batch_size=2),
    "cp2": Parallel(cp=2),
    "cp2 pp2": Parallel(cp=2, pp=2),
}
LOSSES = {
    "all": Loss(anchors=AnchorLoss(weight=1.5)),
    "neurons": Loss(anchors=AnchorLoss(weight=1.5, of=("gate_up",))),
    "outputs": Loss(anchors=AnchorLoss(weight=1.5, of=("attention_output", "mlp_output"))),
}
BOUND_FP64 = 1e-12
Student = tuple[PrunePlan, dict[str, Path]]
CASES = {**{name: (kept, "llama_gqa_tied") for name, kept in DEPTHS.items()}, "no gate": (DEPTHS["width"], "nemotron")}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Student]:
    return {name: layer_folders(tmp_path_factory.mktemp("anchors"), *case) for name, case in CASES.items()}


_PLAIN: dict[str, Any] = {}


def _expected(name: str, student: Student) -> Any:
    if name not in _PLAIN:
        _PLAIN[name] = run_ranks(1, plain_anchor_gradients, LOSSES, *student)[0]
    return _PLAIN[name]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name,
            layout,
            marks=[pytest.mark.slow] * (name != "width and depth" and parallel.tp * parallel.cp * parallel.pp > 2),
        )
        for name in CASES
        for layout, parallel in LAYOUTS.items()
    ],
)
def test_gradients_are_those_of_the_plain_formula(name: str, layout: str, students: dict[str, Student]) -> None:
    plan, folders = students[name]
    parallel = LAYOUTS[layout]
    found = run_ranks(parallel.world_size, anchor_gradients, LOSSES, plan, parallel, folders)[0]
    for loss, (expected, value) in _expected(name, students[name]).items():
        grads, own_value = found[loss]
        assert grads.keys() == expected.keys()
        for key, want in expected.items():
            error = np.linalg.norm(grads[key] - want) / np.linalg.norm(want)
            assert error <= BOUND_FP64, (loss, key, error)
        assert own_value == pytest.approx(value, rel=1e-12), loss


@cache
def _rows(layout: str, student: str, work: Path) -> list[dict[str, float]]:
    plan, folders = _STUDENTS[student]
    own = work / layout.replace(" ", "-")
    own.mkdir()
    parallel = LAYOUTS[layout]
    return run_ranks(parallel.world_size, anchor_rows, ANCHORED, plan, parallel, folders, own, 20)[0]


_STUDENTS: dict[str, Student] = {}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("tp2 with sequence parallel", marks=pytest.mark.slow),
        "tp2 pp2 with sequence parallel",
        pytest.param("cp2 pp2", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_have_the_losses_of_one_process(layout: str, students: dict[str, Student]) -> None:
    _STUDENTS.update(students)
    work = students["width and depth"][1]["work"]
    expected, found = (_rows(name, "width and depth", work) for name in ("one process", layout))
    for key in ("train_loss", "anchor_loss", "valid_kl"):
        mine, theirs = ([row[key] for row in rows if key in row] for rows in (found, expected))
        assert len(mine) == len(theirs) > 0
        np.testing.assert_allclose(mine, theirs, atol=1e-4, err_msg=key)
    anchors = [row["anchor_loss"] for row in expected if "anchor_loss" in row]
    assert np.ptp(anchors) > 0.01, "the anchors must change for this to mean anything"


def test_after_the_decay_the_training_has_no_anchors(students: dict[str, Student], tmp_path: Path) -> None:
    """At weight 0 nothing is computed for anchors; hidden states may be compared at the same time."""
    plan, folders = students["width"]
    loss = Loss(anchors=AnchorLoss(decay_steps=3, decay="cosine"), hidden=HiddenLoss(weight=0.1))
    params = ANCHORED.model_copy(update={"loss": loss})
    rows = run_ranks(1, anchor_rows, params, plan, Parallel(micro_batch_size=2), folders, tmp_path, 5)[0]
    steps = [row["step"] for row in rows if "anchor_loss" in row]
    assert steps == [1, 2, 3]
    assert sum("hidden_loss" in row for row in rows) == 5
