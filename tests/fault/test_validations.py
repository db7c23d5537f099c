"""A validation never costs a step: the checkpoint is complete before whatever may end the process in it."""

from __future__ import annotations

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
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

PARAMS = TrainStage(
    kind="train",
    num_steps=12,
    global_batch_size=4,
    seq_len_tokens=32,
    lr=2e-3,
    precision="fp32",
    valid_num_tokens=128,
    save_interval_steps=3,
)
Folders = dict[str, Path]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    model = tiny_model_dir(tmp_path / "model", "llama_gqa_tied")
    return {"model": model, "data": tiny_data_dir(tmp_path / "data"), "work": tmp_path / "work"}


def _rows(
    folders: Folders, session: Any, params: TrainStage, validate: Any = None, stop: StopRequest | None = None
) -> list[dict[str, float]]:
    """Run or continue a training, with another validation if one is given, and return its curves without times."""
    folders["work"].mkdir(exist_ok=True)
    job = distill.prepare_training(params, folders["model"], folders["data"], folders["work"], session)
    if validate is not None:
        job = replace(job, objective=replace(job.objective, validate=validate(job.objective.validate)))
    options = training.LoopOptions(Execution(async_checkpoints=True), stop=stop or StopRequest())
    curves = training.run(job, folders["work"], Progress(silent=True), options)
    return [{key: value for key, value in row.items() if key not in ("tokens_per_s", "mfu")} for row in curves.rows]


@pytest.mark.parametrize(("interval", "saved"), [(3, 3), (100, 12)], ids=["first interval", "last step"])
def test_a_validation_that_runs_out_of_memory_loses_no_step(
    interval: int, saved: int, folders: Folders, tmp_path: Path
) -> None:
    def failing(measure: Any) -> Any:
        measured: list[int] = []

        def validate() -> dict[str, float]:
            # That of the first model has no optimizer states beside it.
            if measured:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            measured.append(1)
            return measure()

        return validate

    params = PARAMS.model_copy(update={"valid_interval_steps": interval})
    with open_session(Parallel(), device="cpu", threads=1) as session:
        expected = _rows({**folders, "work": tmp_path / "whole"}, session, params)
        with pytest.raises(torch.OutOfMemoryError):
            _rows(folders, session, params, failing)
        assert checkpoints(folders["work"] / "checkpoints")[-1].name == f"step_{saved:08d}"
        assert _rows(folders, session, params) == expected, "the validation of that step is neither lost nor doubled"


class _StopAfter(StopRequest):
    """A stop that is requested in one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.steps_left = step

    def source(self) -> str | None:
        self.steps_left -= 1
        return None if self.steps_left else "SIGTERM"


def _noting_checkpoints(folders: Folders, seen: list[int]) -> Any:
    """Return a validation that first notes the newest checkpoint, 0 if there is none."""

    def noting(measure: Any) -> Any:
        def validate() -> dict[str, float]:
            seen.append(max(map(step_of, checkpoints(folders["work"] / "checkpoints")), default=0))
            return measure()

        return validate

    return noting


def test_a_stopped_training_leaves_its_validation_to_the_run_that_resumes(folders: Folders, tmp_path: Path) -> None:
    params, seen = PARAMS.model_copy(update={"valid_interval_steps": 3}), list[int]()
    with open_session(Parallel(), device="cpu", threads=1) as session:
        expected = _rows({**folders, "work": tmp_path / "whole"}, session, params)
        with pytest.raises(Interrupted, match="stopped after step 6 of 12"):
            _rows(folders, session, params, _noting_checkpoints(folders, seen), _StopAfter(6))
        assert seen == [0, 3], "before the first step and after the third"
        assert _rows(folders, session, params) == expected


def test_a_training_stopped_in_its_last_step_has_its_checkpoint_before_the_validation(folders: Folders) -> None:
    params, seen = PARAMS.model_copy(update={"valid_interval_steps": 6}), list[int]()
    with open_session(Parallel(), device="cpu", threads=1) as session:
        _rows(folders, session, params, _noting_checkpoints(folders, seen), _StopAfter(12))
    assert seen == [0, 6, 12]
