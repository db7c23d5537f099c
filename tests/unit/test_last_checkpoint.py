"""The checkpoint from which NeMo resumes, after a kill at any moment of writing one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.backends.alignment.base import SftObjective, TaskContext, Training
from nemo_minitron.backends.alignment.nemo_aligner import rollouts as rollouts_module
from nemo_minitron.backends.alignment.nemo_aligner import training as training_module
from nemo_minitron.backends.alignment.nemo_aligner.last_checkpoint import keep_last_checkpoint
from nemo_minitron.backends.alignment.nemo_aligner.rollout_keys import critic_steps
from nemo_minitron.backends.alignment.nemo_aligner.servers import Running, ServerTask
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO
from tests.unit.test_rollout_rules import CRITIC, rollouts

CASES: dict[str, tuple[list[str], list[str], int]] = {
    "no checkpoint": ([], [], 0),
    "the first is unfinished": (["step=2-last", "step=2-last-unfinished"], [], 0),
    "the folder of the first does not exist yet": (["step=2-last-unfinished"], [], 0),
    "a later one is unfinished": (
        ["step=2-last", "step=10-last", "step=10-last-unfinished", "step=2-val_loss=1.0"],
        ["step=2-last", "step=2-val_loss=1.0"],
        2,
    ),
    "the one before has not been removed yet": (["step=10-last", "step=9-last"], ["step=10-last"], 10),
    "the one before is half removed": (["step=2-last", "step=2-last-unfinished", "step=4-last"], ["step=4-last"], 4),
    "the best one is unfinished": (["step=2-val_loss=1.0", "step=2-val_loss=1.0-unfinished"], [], 0),
}
"""What a kill leaves, what is kept, and the step of the checkpoint to resume from."""


def plant(work: Path, names: Sequence[str]) -> Path:
    folder = work / "nemo_experiment/checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith("-unfinished"):
            (folder / name).touch()
        else:
            (folder / name).mkdir()
            (folder / name / "weights").write_text(name)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_only_the_newest_finished_checkpoint_is_kept(case: str, tmp_path: Path) -> None:
    left, kept, step = CASES[case]
    folder = plant(tmp_path, left)
    assert keep_last_checkpoint(tmp_path) == step
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)
    assert keep_last_checkpoint(tmp_path / "new") == 0


def test_a_training_starts_with_a_checkpoint_that_nemo_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plant(tmp_path / "training", ["step=4-last", "step=6-last", "step=6-last-unfinished"])
    found: list[list[str]] = []
    monkeypatch.setattr(training_module, "converted", lambda *_, **__: {})
    monkeypatch.setattr(
        training_module, "run_task", lambda *_, **__: found.append([path.name for path in folder.iterdir()])
    )
    training = Training(tmp_path, SftObjective(), tmp_path, tmp_path, 8, 4, 8, 128, 1e-3, 1e-4, 1, 2, 1234)
    context = TaskContext("sft", tmp_path, Parallel(), "cpu", 1, Progress(silent=True), StopRequest())
    training_module._train(training, tmp_path / "out", context, None)
    assert found == [["step=4-last"]]


def test_the_critic_resumes_at_the_step_of_the_actors_finished_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = plant(tmp_path / "training", ["step=2-last", "step=4-last", "step=4-last-unfinished"])
    critic = plant(tmp_path / "critic", ["step=8-last", "step=12-last"])
    started: list[ServerTask] = []

    @contextmanager
    def serving(servers: list[ServerTask], *_: Any, **__: Any) -> Iterator[Running]:
        started.extend(servers)
        yield Running({}, lambda: None)

    monkeypatch.setattr(rollouts_module, "serving", serving)
    monkeypatch.setattr(rollouts_module, "run_task", lambda *_, **__: None)
    settings = replace(rollouts(CRITIC, REPO / "nemo_minitron/toy/model"), evaluator=["true"])
    context = TaskContext("ppo", tmp_path, Parallel(), "cpu", 1, Progress(silent=True), StopRequest())
    rollouts_module._run_actor(
        settings, tmp_path / "nemo", tmp_path / "trained", tmp_path / "training", context, None, on_cpu=True
    )
    (server,) = [server for server in started if server.name == "critic_server"]
    assert server.task["step"] == critic_steps(settings, 2)
    assert [path.name for path in actor.iterdir()] == ["step=2-last"]
    assert [path.name for path in critic.iterdir()] == ["step=12-last"]
