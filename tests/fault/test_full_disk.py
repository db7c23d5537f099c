"""A disk that becomes full at each stage: one message, no incomplete output, and later the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.artifacts.store import Store
from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training.checkpoint import checkpoints, step_of
from nemo_minitron.execution.work import open_work
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO, TOY, Cli
from tests.support.aligner import require_aligner
from tests.support.disks import PAGE, SmallDisk, small_disk
from tests.support.part_runs import computed, copy_before

CACHED = REPO / "recipes/toy/cached.yaml"
SEARCH = REPO / "recipes/toy/search.yaml"
ALIGNED = REPO / "recipes/toy/aligned.yaml"
FEW = (0.0, 0.5, 1.0)
"""Free space, as shares of the size of the output. A stage needs a little more, for its work folder and log."""
MANY = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as made:
        yield made


def _published_bytes(stage: Path) -> int:
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in stage.rglob("*") if file.is_file())


def _require_clean_failure(code: int, output: str, run: Path, stage: str, finished: set[str]) -> None:
    flat = " ".join(output.split())
    assert code == 2, output
    assert flat.count("error:") == 1
    assert "Traceback" not in output
    assert "disk is full" in flat
    assert "Free space" in flat
    assert f"where: {run}" in flat
    assert not (run / stage).exists()
    assert not list(run.glob(".partial-*"))
    assert {file.parent.name for file in run.glob("*/manifest.json")} == finished


def _fill_again_and_again(
    minitron: Cli, disk: SmallDisk, run: Path, stage: str, recipe: Path, sizes: list[int], *overrides: str
) -> int:
    """Try with more and more space, finally with plenty; return how often the disk was full."""
    finished = {file.parent.name for file in run.glob("*/manifest.json")}
    command = ("run", recipe, f"execution.run_root={disk.path}", *overrides, "--until", stage)
    failed = 0
    for free_bytes in sizes:
        disk.leave(free_bytes)
        code, output = minitron(*command)
        if code == 0:
            break
        _require_clean_failure(code, output, run, stage, finished)
        failed += 1
    disk.leave(1 << 29)
    code, output = minitron(*command)
    assert code == 0, output
    assert not list(run.glob(".partial-*"))
    return failed


STAGES = ("teacher", "data", "score", "select", "prune", "export")
SLOW_STAGES = ("check_teacher", "evaluate_pruned", "speed", "report")


@pytest.mark.parametrize("stage", [*STAGES, *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW_STAGES)])
def test_a_disk_that_is_full_at_a_stage(stage: str, disk: SmallDisk, toy_run: Path, minitron: Cli) -> None:
    whole = toy_run / "toy/width" / stage
    run = copy_before(toy_run, disk.path, stage)
    sizes = [int(share * _published_bytes(whole)) for share in FEW]
    assert _fill_again_and_again(minitron, disk, run, stage, TOY, sizes) >= 2
    assert computed(run / stage) == computed(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, *SLOW_STAGES])
def test_a_disk_that_grows_by_little_steps(stage: str, disk: SmallDisk, toy_run: Path, minitron: Cli) -> None:
    whole = toy_run / "toy/width" / stage
    run = copy_before(toy_run, disk.path, stage)
    size = _published_bytes(whole)
    # For small stages, try every page, so that each of their writes fails once.
    sizes = [page * PAGE for page in range(16)] if size < 1 << 16 else [int(share * size) for share in MANY]
    assert _fill_again_and_again(minitron, disk, run, stage, TOY, sizes) >= 3
    assert computed(run / stage) == computed(whole)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_training_loses_no_checkpoint(disk: SmallDisk, toy_run: Path, minitron: Cli) -> None:
    """There is space for half a checkpoint, then for one, then for another one."""
    run = copy_before(toy_run, disk.path, "distill")
    kept = run / ".work/distill/checkpoints"
    # Weights and two moments, in fp32.
    one_checkpoint = 12 * json.loads((run / "prune/manifest.json").read_text())["result"]["num_params"]
    finished = {file.parent.name for file in run.glob("*/manifest.json")}
    command = ("run", TOY, f"execution.run_root={disk.path}", "--until", "distill")
    reached = []
    for share in (0.5, 1.5, 1.5):
        disk.leave(int(share * one_checkpoint))
        code, output = minitron(*command)
        _require_clean_failure(code, output, run, "distill", finished)
        assert not list(kept.glob(".partial*"))
        reached.append([step_of(folder) for folder in checkpoints(kept)])
    assert reached == [[], [10], [10, 20]]
    disk.leave(1 << 29)
    code, output = minitron(*command)
    assert code == 0, output
    assert "distill 20/30" in output
    assert computed(run / "distill") == computed(toy_run / "toy/width/distill")


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_training_is_published(disk: SmallDisk, toy_run: Path, minitron: Cli) -> None:
    run = copy_before(toy_run, disk.path, "distill")
    _train_to_the_end(run, disk.path)
    work = run / ".work/distill"
    sizes = [int(share * _published_bytes(toy_run / "toy/width/distill")) for share in (0.1, 0.4, 0.9)]
    assert _fill_again_and_again(minitron, disk, run, "distill", TOY, sizes) == 3
    assert computed(run / "distill") == computed(toy_run / "toy/width/distill")
    assert not work.exists()


def _train_to_the_end(run: Path, root: Path) -> None:
    """This is the work folder of a runner that dies between the last step and publishing."""
    plan = load_plan(TOY, [f"execution.run_root={root}"])
    silent = Progress(silent=True)
    work, _ = open_work(plan.call("distill"), Store(run), silent)
    folders = (run / stage for stage in ("prune", "teacher", "data"))
    params = plan.recipe.stages["distill"]
    assert isinstance(params, DistillStage)
    with open_session(plan.call("distill").parallel, device="cpu", threads=os.cpu_count()) as session:
        training.run(distill.prepare(params, *folders, work, session), work, silent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "name", "stage"),
    [(CACHED, "toy/cached", "cache_teacher"), (SEARCH, "toy/search", "search_l3_h56_f160")],
    ids=["cache_teacher", "candidate"],
)
def test_a_disk_that_is_full_at_a_stage_of_another_recipe(
    recipe: Path, name: str, stage: str, disk: SmallDisk, toy_run: Path, minitron: Cli, tmp_path: Path
) -> None:
    _require_same_when_full(recipe, name, stage, copy_before(toy_run, disk.path, "score", recipe, name), disk, minitron)


@pytest.mark.slow
def test_a_disk_that_is_full_under_several_processes(disk: SmallDisk, toy_run: Path, minitron: Cli) -> None:
    """The error of a rank reaches the runner, although there is no space for a new file with the message."""
    run = copy_before(toy_run, disk.path, "score")
    # No space; then space for the task file, the ranks' message, and a little of their output.
    sizes = [pages * PAGE for pages in (0, 10, 12)]
    layout = "execution.parallel_by_stage={score: {dp: 2, micro_batch_size: 4}}"
    assert _fill_again_and_again(minitron, disk, run, "score", TOY, sizes, layout) >= 2
    assert (run / "logs/score.ranks.log").is_file()
    assert computed(run / "score").keys() == computed(toy_run / "toy/width/score").keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_disk_that_is_full_at_an_alignment(stage: str, disk: SmallDisk, toy_run: Path, minitron: Cli) -> None:
    require_aligner()
    run = copy_before(toy_run, disk.path, "export", ALIGNED, "toy/aligned")
    _require_same_when_full(ALIGNED, "toy/aligned", stage, run, disk, minitron)


def _require_same_when_full(recipe: Path, name: str, stage: str, run: Path, disk: SmallDisk, minitron: Cli) -> None:
    """Run a stage with enough space, remove its output, and run it with too little."""
    code, output = minitron("run", recipe, f"execution.run_root={disk.path}", "--until", stage)
    assert code == 0, output
    whole = disk.path / "whole"
    (run / stage).rename(whole)
    size = _published_bytes(whole)
    assert _fill_again_and_again(minitron, disk, run, stage, recipe, [int(share * size) for share in FEW]) >= 2
    assert computed(run / stage) == computed(whole)
