"""Layer-local distillation: the gradients of a plain formula, and the same training in every parallel layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nemo_minitron.backends.megatron.distillation.layerwise import cut_layers
from nemo_minitron.families import read_shape
from nemo_minitron.hf.checkpoint import read_config
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.system.progress import Progress
from tests.support.distributed import run_ranks
from tests.support.gradients import Found
from tests.support.tiny_layers import (
    DEPTHS,
    TWENTY_STEPS,
    layer_folders,
    layer_gradients,
    layer_rows,
    plain_layer_gradients,
)
from tests.support.tiny_models import load_transformers

LAYOUTS = {
    "one process": Parallel(),
    "tp2": Parallel(tp=2, micro_batch_size=2),
    "tp2 with sequence parallel": Parallel(tp=2, micro_batch_size=2, sequence_parallel=True),
    "pp2": Parallel(pp=2),
    "tp2 pp2 with sequence parallel": Parallel(tp=2, pp=2, sequence_parallel=True),
    "dp2": Parallel(dp=2),
    "cp2": Parallel(cp=2, micro_batch_size=2),
    "cp2 pp2": Parallel(cp=2, pp=2),
    "dp2, distributed optimizer, overlapped": Parallel(
        dp=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    ),
    "attention recomputed": Parallel(micro_batch_size=2, recompute="selective"),
}
OVERLAPPED = "dp2, distributed optimizer, overlapped"
BOUND_PLAIN, BOUND_FP64 = 1e-6, 1e-12
"""Relative errors. The plain formula runs in transformers, which computes norms in fp32 also in an fp64 model."""
Student = tuple[PrunePlan, dict[str, Path]]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Student]:
    return {name: layer_folders(tmp_path_factory.mktemp("layers"), kept) for name, kept in DEPTHS.items()}


@pytest.mark.parametrize("name", DEPTHS)
def test_gradients_are_those_of_the_plain_formula(name: str, students: dict[str, Student]) -> None:
    plan, folders = students[name]
    expected, (loss,) = run_ranks(1, plain_layer_gradients, plan, folders)[0]
    grads, losses = _gradients(name, "one process", students)
    trained = {key for key in expected if key.startswith("model.layers.")}
    assert trained <= grads.keys()
    for key in expected.keys() & grads.keys():
        if key in trained:
            assert _error(grads[key], expected[key]) <= BOUND_PLAIN, key
        else:
            assert not grads[key].any(), f"{key} is not in a layer and must not be trained"
    np.testing.assert_allclose(np.mean(losses), loss, rtol=BOUND_PLAIN)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("one process", OVERLAPPED)])
@pytest.mark.parametrize("name", DEPTHS)
def test_gradients_are_those_of_one_process(name: str, layout: str, students: dict[str, Student]) -> None:
    """Layouts without a distributed optimizer, whose gradients are spread over the ranks; the losses below cover it."""
    expected, _ = _gradients(name, "one process", students)
    found, _ = _gradients(name, layout, students)
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        assert _error(found[key], want) <= BOUND_FP64, key


def _error(found: NDArray, want: NDArray) -> float:
    return float(np.linalg.norm(found - want) / (np.linalg.norm(want) or 1.0))


def _gradients(name: str, layout: str, students: dict[str, Student]) -> Found:
    plan, folders = students[name]
    return run_ranks(LAYOUTS[layout].world_size, layer_gradients, plan, LAYOUTS[layout], folders)[0]


@cache
def _rows(name: str, layout: str, plan_of: int, work: Path) -> tuple[dict[str, float], ...]:
    plan, folders = _STUDENTS[plan_of]
    own = work / f"{name}-{layout}".replace(" ", "-")
    own.mkdir()
    parallel = Parallel(micro_batch_size=4) if layout == "one" else LAYOUTS[layout]
    rows = run_ranks(parallel.world_size, layer_rows, TWENTY_STEPS, plan, parallel, folders, own, 20)[0]
    return tuple(rows)


_STUDENTS: dict[int, Student] = {}


def _curves(name: str, layout: str, students: dict[str, Student]) -> tuple[dict[str, float], ...]:
    _STUDENTS[list(DEPTHS).index(name)] = students[name]
    return _rows(name, layout, list(DEPTHS).index(name), students[name][1]["work"])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        # The curves of the other student, which has fewer layers as well, are in `make test` in every layout.
        pytest.param(name, layout, marks=[pytest.mark.slow] * (name == "width" and layout != "tp2"))
        for name in DEPTHS
        for layout in LAYOUTS
        if layout != "one process"
    ],
)
def test_twenty_steps_have_the_losses_of_one_process(name: str, layout: str, students: dict[str, Student]) -> None:
    expected, found = _curves(name, "one", students), _curves(name, layout, students)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    first, last = expected[0], expected[-1]
    assert last["valid_layer_loss"] < 0.95 * first["valid_layer_loss"], "layers must learn for this to mean anything"
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(mine.values()), list(theirs.values()), atol=1e-4, err_msg=str(theirs))


@pytest.mark.parametrize("name", DEPTHS)
def test_every_layer_is_trained_and_the_rest_is_unchanged(name: str, students: dict[str, Student]) -> None:
    rows = _curves(name, "one", students)
    layers = range(len(DEPTHS[name]))
    for layer in layers:
        assert rows[-1][f"valid_layer_loss_{layer}"] < rows[0][f"valid_layer_loss_{layer}"]
    mean = sum(rows[-1][f"valid_layer_loss_{layer}"] for layer in layers) / len(layers)
    assert rows[-1]["valid_layer_loss"] == pytest.approx(mean)
    folders = students[name][1]
    before = load_transformers(folders["student"]).state_dict()
    after = load_transformers(folders["work"] / f"{name}-one".replace(" ", "-") / "published").state_dict()
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key]) != key.startswith("model.layers."), key


def test_a_resumed_training_has_the_same_bits(students: dict[str, Student]) -> None:
    plan, folders = students["width"]
    layout = Parallel(dp=2, distributed_optimizer=True)
    works = [folders["work"] / f"resumed-{name}" for name in ("whole", "stopped")]
    for work in works:
        work.mkdir()
    whole = run_ranks(2, layer_rows, TWENTY_STEPS, plan, layout, folders, works[0], 12)[0]
    run_ranks(2, layer_rows, TWENTY_STEPS, plan, layout, folders, works[1], 7)
    resumed = run_ranks(2, layer_rows, TWENTY_STEPS, plan, layout, folders, works[1], 12)[0]
    trained = [[row["train_loss"] for row in rows if "train_loss" in row] for rows in (whole, resumed)]
    assert trained[0] == trained[1]
    assert len(trained[0]) == 12


def _depth_plan(plan: PrunePlan, kept: tuple[int, ...]) -> PrunePlan:
    """Return the plan without any cut of width."""
    whole = {"ffn": 96, "heads": 8, "groups": 4}
    by_layer = {name: dict.fromkeys(kept, tuple(range(size))) for name, size in whole.items()}
    return PrunePlan("importance", kept, {"hidden": tuple(range(64))}, by_layer)


def test_layers_that_the_plan_leaves_whole_are_not_trained(students: dict[str, Student], tmp_path: Path) -> None:
    """They start without error, and Adam would move them however small their gradients are."""
    plan, folders = students["width"]
    plan = _depth_plan(plan, (0, 1, 3, 4, 5))
    student = tmp_path / "student"
    student.mkdir()
    prune_checkpoint(folders["teacher"], plan, student, Progress(silent=True))
    one = Parallel(micro_batch_size=4)
    own = {**folders, "student": student}
    rows = run_ranks(1, layer_rows, TWENTY_STEPS, plan, one, own, tmp_path, 20)[0]
    last = {layer: rows[-1][f"valid_layer_loss_{layer}"] for layer in range(5)}
    assert [layer for layer, loss in last.items() if loss] == [1]
    assert last[1] < rows[0]["valid_layer_loss_1"]
    before, after = (load_transformers(path).state_dict() for path in (student, tmp_path / "published"))
    changed = {key.split(".")[2] for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed == {"1"}
    with pytest.raises(AssertionError, match=r"PlanError: The plan leaves every layer .* of a pipeline stage"):
        run_ranks(2, layer_rows, TWENTY_STEPS, plan, Parallel(pp=2), own, tmp_path, 20)


@pytest.mark.parametrize(
    ("kept", "trained"),
    [((0, 1, 3, 4, 5), [1]), ((0, 1, 2, 3), [3]), ((1, 2, 3, 4, 5), [0]), ((2, 3, 5), [0, 1])],
)
def test_in_depth_pruning_the_layer_before_dropped_ones_is_trained_not_the_one_behind_them(
    kept: tuple[int, ...], trained: list[int], students: dict[str, Student]
) -> None:
    """The first kept layer is trained as well if layers before it were dropped."""
    plan, folders = students["width"]
    assert cut_layers(_depth_plan(plan, kept), read_shape(read_config(folders["teacher"]))) == trained


@pytest.mark.parametrize("distributed", [False, True])
def test_a_training_of_some_layers_resumes(distributed: bool, students: dict[str, Student], tmp_path: Path) -> None:
    """The other layers have no optimizer states in its checkpoints."""
    plan, folders = students["width"]
    plan = _depth_plan(plan, (0, 1, 3, 4, 5))
    student = tmp_path / "student"
    student.mkdir()
    prune_checkpoint(folders["teacher"], plan, student, Progress(silent=True))
    layout, own = Parallel(dp=2, distributed_optimizer=distributed), {**folders, "student": student}
    works = [tmp_path / name for name in ("whole", "stopped")]
    for work in works:
        work.mkdir()
    whole = run_ranks(2, layer_rows, TWENTY_STEPS, plan, layout, own, works[0], 8)[0]
    run_ranks(2, layer_rows, TWENTY_STEPS, plan, layout, own, works[1], 5)
    resumed = run_ranks(2, layer_rows, TWENTY_STEPS, plan, layout, own, works[1], 8)[0]
    losses = [[row["train_loss"] for row in rows if "train_loss" in row] for rows in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_a_plan_that_leaves_every_layer_whole_is_refused(students: dict[str, Student], tmp_path: Path) -> None:
    plan, folders = students["width"]
    plan, own = _depth_plan(plan, plan.layers), {**folders, "student": folders["teacher"]}
    with pytest.raises(AssertionError, match="PlanError: The plan leaves every layer"):
        run_ranks(1, layer_rows, TWENTY_STEPS, plan, Parallel(micro_batch_size=4), own, tmp_path, 1)
