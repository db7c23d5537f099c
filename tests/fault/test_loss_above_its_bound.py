"""A training that stops or ends while its loss is above the guard's bound."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training.checkpoint import checkpoints, step_of
from nemo_minitron.errors import Interrupted
from nemo_minitron.schema.execution import Execution, Parallel
from nemo_minitron.stages.train.params import TrainStage
from nemo_minitron.system.interrupts import STOP_FILE, StopRequest
from nemo_minitron.system.progress import Progress
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

PARAMS = TrainStage(
    kind="train",
    num_steps=13,
    global_batch_size=2,
    seq_len_tokens=16,
    lr=1e-3,
    precision="fp32",
    valid_num_tokens=32,
    save_interval_steps=5,
)
USUAL, BAD = 1.0, 9.0
Rows = list[dict[str, float]]


class Heard(Progress):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__(silent=True)
        self.messages: list[str] = []

    def say(self, text: str, mark: str = "", style: str = "") -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bound")
    return {"model": tiny_model_dir(root, "llama_gqa_tied"), "data": tiny_data_dir(root / "data")}


def _train(
    folders: dict[str, Path], work: Path, bad: Collection[int] = (), stop_in: int | None = None
) -> tuple[Rows, list[str]]:
    """Run or continue a training whose loss is BAD in some steps; return its curves without times, and its messages."""
    (work / STOP_FILE).unlink(missing_ok=True)
    work.mkdir(exist_ok=True)
    heard = Heard()
    options = training.LoopOptions(
        Execution(peak_tflops=1.0), stop=StopRequest(work), stage="healing", keys="stages.healing"
    )
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = distill.prepare_training(PARAMS, folders["model"], folders["data"], work, session)
        real = job.objective.gradients

        def gradients(trainable: Any, part: Any, *args: Any) -> list[dict[str, torch.Tensor]]:
            step = part.step + 1
            if step == stop_in:
                (work / STOP_FILE).touch()
            loss = torch.tensor(BAD if step in bad else USUAL)
            return [{**parts, "train_loss": loss} for parts in real(trainable, part, *args)]

        job = replace(job, objective=replace(job.objective, gradients=gradients))
        rows = training.run(job, work, heard, options).rows
    return [{key: row[key] for key in row if key not in ("tokens_per_s", "mfu")} for row in rows], heard.messages


def _saved(work: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(work / "checkpoints")]


def test_a_stop_above_the_bound_resumes_before_it(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = _train(folders, tmp_path / "whole")
    work = tmp_path / "stopped"
    with pytest.raises(Interrupted) as stopped:
        _train(folders, work, bad={12}, stop_in=12)
    assert str(stopped.value) == (
        "healing stopped after step 12 of 13 as requested by the file STOP; the same command continues from step 10: "
        "the loss was above its bound, so no checkpoint was written."
    )
    assert _saved(work) == [5, 10]
    assert _train(folders, work) == whole, "the steps after the checkpoint are done again"
    assert whole[1] == []


def test_a_training_that_ends_above_the_bound_says_so_and_keeps_its_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rows, messages = _train(folders, tmp_path, bad={12, 13})
    assert messages == [
        "healing: the last losses (2) exceed stages.healing.guard.max_ratio times the usual loss. The model is kept as "
        "it is; look at the curve before you use it."
    ]
    assert [row["train_loss"] for row in rows if "train_loss" in row] == [USUAL] * 11 + [BAD] * 2
    assert "valid_loss" in rows[-1]
    assert _saved(tmp_path) == [5, 10]
