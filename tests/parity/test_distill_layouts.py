"""The same distillation, and the same scores, in every parallel layout."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.config.schema import DistillStage, Parallel
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import distill_losses, distill_until
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

PARAMS = DistillStage(
    kind="distill",
    num_steps=20,
    global_batch_size=4,
    seq_len_tokens=32,
    lr=2e-3,
    warmup_steps=2,
    precision="fp32",
    valid_interval_steps=10,
    valid_num_tokens=256,
    save_interval_steps=100,
)
LAYOUTS = {
    "tp2": Parallel(tp=2, micro_batch_size=2),
    "tp2 with sequence parallel": Parallel(tp=2, micro_batch_size=2, sequence_parallel=True),
    "pp2": Parallel(pp=2),
    "dp2": Parallel(dp=2),
    "dp2, overlapped": Parallel(dp=2, overlap_grad_reduce=True),
    "attention recomputed": Parallel(micro_batch_size=2, recompute="selective"),
    "tp2, layers recomputed": Parallel(tp=2, micro_batch_size=2, recompute="full"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("distill")
    return {
        "student": tiny_model_dir(root / "student", "llama_gqa_tied", intermediate_size=64, seed=1),
        "teacher": tiny_model_dir(root / "teacher", "llama_gqa_tied"),
        "data": tiny_data_dir(root / "data"),
        "work": root,
    }


@cache
def _losses(name: str, parallel: Parallel, student: Path, teacher: Path, data: Path, work: Path) -> tuple:
    own = work / f"work-{name.replace(' ', '-')}"
    own.mkdir()
    return run_ranks(parallel.world_size, distill_losses, PARAMS, parallel, student, teacher, data, own)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_steps_have_the_losses_of_one_process(name: str, folders: dict[str, Path]) -> None:
    train, valid = _losses("one", Parallel(micro_batch_size=4), **folders)
    assert train[-1] < 0.8 * train[0], "the student must learn for this to mean anything"
    found_train, found_valid = _losses(name, LAYOUTS[name], **folders)
    assert len(found_train) == 20
    np.testing.assert_allclose(found_train, train, atol=1e-4)
    np.testing.assert_allclose(found_valid, valid, atol=1e-4)


def test_a_resume_may_have_another_data_parallel_size(folders: dict[str, Path]) -> None:
    train, _ = _losses("one", Parallel(micro_batch_size=4), **folders)
    models = (folders["student"], folders["teacher"], folders["data"])
    work = folders["work"] / "resumed"
    work.mkdir()
    run_ranks(2, distill_until, PARAMS, Parallel(dp=2), *models, work, 7)
    run_ranks(1, distill_until, PARAMS, Parallel(micro_batch_size=2), *models, work, 14)
    found = run_ranks(2, distill_until, PARAMS, Parallel(dp=2), *models, work, 20)[0]
    np.testing.assert_allclose(found, train, atol=1e-4)


def test_a_distributed_optimizer_that_could_not_resume_is_refused(folders: dict[str, Path]) -> None:
    if importlib.util.find_spec("transformer_engine") or importlib.util.find_spec("apex"):
        pytest.skip("Transformer Engine or Apex is installed")
    work = folders["work"] / "refused"
    work.mkdir()
    order = (PARAMS, Parallel(distributed_optimizer=True), *(folders[key] for key in ("student", "teacher", "data")))
    with pytest.raises(AssertionError, match="needs Transformer Engine or Apex"):
        run_ranks(1, distill_losses, *order, work)
