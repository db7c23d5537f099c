"""Teacher correction during distillation: the teacher is trained as without a student, in every layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training.checkpoint import checkpoints
from nemo_minitron.errors import NumericsError
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.stages.train.params import CorrectStage
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import SILENT, Row, corrected_rows, rows_until
from tests.support.tiny_distill import distill_folders

SHARED = {
    "num_steps": 6,
    "global_batch_size": 4,
    "seq_len_tokens": 32,
    "precision": "fp32",
    "valid_interval_steps": 3,
    "valid_num_tokens": 256,
}
RATE = {"pretraining_lr": 1e-2, "warmup_steps": 2, "lr_schedule": "linear", "min_lr": 1e-4}
PARAMS = DistillStage(
    kind="distill",
    lr=2e-3,
    loss={"logits": {}, "hidden": {"pairs": [[1, 1]], "weight": 1.0}},  # type: ignore[arg-type]
    teacher_correction=RATE,  # type: ignore[arg-type]
    **SHARED,  # type: ignore[arg-type]
)
ALONE = CorrectStage(kind="correct", **RATE, **SHARED)  # type: ignore[arg-type]
ONE = Parallel(micro_batch_size=2)
LAYOUTS = {
    "tp2 with sequence parallel": Parallel(tp=2, micro_batch_size=2, sequence_parallel=True),
    "dp2, distributed optimizer, overlapped": Parallel(
        dp=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    ),
}
MORE_LAYOUTS = {"pp2": Parallel(pp=2), "cp2": Parallel(cp=2, micro_batch_size=2)}
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return distill_folders(tmp_path_factory.mktemp("correction"))


@cache
def _one(precision: str, student: Path, teacher: Path, data: Path, work: Path) -> tuple[list[Row], list[Row]]:
    own = work / f"one-{precision}"
    own.mkdir()
    return corrected_rows(PARAMS.model_copy(update={"precision": precision}), ONE, student, teacher, data, own)


def _column(rows: list[Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_is_trained_as_without_a_student(precision: str, folders: Folders, tmp_path: Path) -> None:
    rows, _ = _one(precision, **folders)
    with open_session(ONE, device="cpu", threads=1) as session:
        params = ALONE.model_copy(update={"precision": precision})
        job = distill.prepare_training(params, folders["teacher"], folders["data"], tmp_path, session)
        alone = rows_until(job, tmp_path, 6)
    pairs = {"teacher_loss": "train_loss", "teacher_lr": "lr", "teacher_grad_norm": "grad_norm"}
    for key, own in {**pairs, "valid_teacher_loss": "valid_loss"}.items():
        assert _column(rows, key) == _column(alone, own), key
    losses = _column(rows, "valid_teacher_loss")
    assert losses[-1] < losses[0] - 0.1, "the teacher must learn for this to mean anything"


def test_the_student_uses_the_teacher_before_its_update(folders: Folders, tmp_path: Path) -> None:
    rows, _ = _one("fp32", **folders)
    with open_session(ONE, device="cpu", threads=1) as session:
        params = PARAMS.model_copy(update={"teacher_correction": None})
        job = distill.prepare(params, folders["student"], folders["teacher"], folders["data"], tmp_path, session)
        frozen = rows_until(job, tmp_path, 6)
    found, expected = (
        [(row["train_loss"], row["grad_norm"]) for row in of if "train_loss" in row] for of in (rows, frozen)
    )
    assert found[0] == expected[0]
    assert all(abs(one[0] - other[0]) > 1e-3 for one, other in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resume_gives_the_same_bits(precision: str, folders: Folders) -> None:
    whole, resumed = _one(precision, **folders)
    assert resumed == whole


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LAYOUTS)])
def test_every_layout_has_the_losses_of_one_process_and_resumes(name: str, folders: Folders, tmp_path: Path) -> None:
    expected, _ = _one("fp32", **folders)
    layout = {**LAYOUTS, **MORE_LAYOUTS}[name]
    models = (folders["student"], folders["teacher"], folders["data"])
    whole, resumed = run_ranks(layout.world_size, corrected_rows, PARAMS, layout, *models, tmp_path)[0]
    for key in ("train_loss", "hidden_loss", "teacher_loss", "valid_kl", "valid_loss", "valid_teacher_loss"):
        np.testing.assert_allclose(_column(whole, key), _column(expected, key), atol=1e-4, err_msg=key)
    assert resumed == whole


def test_a_teacher_that_blows_up_is_named(folders: Folders, tmp_path: Path) -> None:
    correction = PARAMS.teacher_correction
    assert correction is not None
    update = {"teacher_correction": correction.model_copy(update={"lr": 1e30, "warmup_steps": 0})}
    params = PARAMS.model_copy(update={**update, "save_interval_steps": 2})
    with open_session(ONE, device="cpu", threads=1) as session:
        job = distill.prepare(params, folders["student"], folders["teacher"], folders["data"], tmp_path, session)
        with pytest.raises(NumericsError, match=r"the teacher's loss .*, gradient norm nan at step 2\.") as found:
            training.run(job, tmp_path, SILENT)
    assert "Lower stages.training.teacher_correction.lr" in str(found.value)
    assert not checkpoints(tmp_path / "checkpoints")
