"""The same distillation, and the same scores, in every parallel layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.schema.execution import Parallel
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import (
    distill_losses,
    distill_losses_beside_a_gpu,
    distill_until,
    distill_until_beside_fused_adam,
)
from tests.support.tiny_distill import TWENTY_STEPS, distill_folders

PARAMS = TWENTY_STEPS
OF_RECIPES = Parallel(
    tp=2,
    dp=2,
    sequence_parallel=True,
    distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
)
"""What the recipes for several GPUs use, with fewer of them."""
LAYOUTS = {
    "tp2": Parallel(tp=2, micro_batch_size=2),
    "tp2 with sequence parallel": Parallel(tp=2, micro_batch_size=2, sequence_parallel=True),
    "pp2": Parallel(pp=2),
    "dp2": Parallel(dp=2),
    "cp2": Parallel(cp=2, micro_batch_size=2),
    "tp2 cp2 with sequence parallel": Parallel(tp=2, cp=2, micro_batch_size=2, sequence_parallel=True),
    "dp2, overlapped": Parallel(dp=2, overlap_grad_reduce=True),
    "dp2, distributed optimizer": Parallel(dp=2, distributed_optimizer=True),
    "dp2, distributed optimizer, overlapped": Parallel(
        dp=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    ),
    "tp2 dp2, as in the recipes": OF_RECIPES,
    "pp2 dp2": Parallel(pp=2, dp=2),
    "attention recomputed": Parallel(micro_batch_size=2, recompute="selective"),
    "tp2, layers recomputed": Parallel(tp=2, micro_batch_size=2, recompute="full"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return distill_folders(tmp_path_factory.mktemp("distill"))


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this with a real one")
def test_a_gpu_in_the_machine_changes_nothing_on_the_cpu(folders: dict[str, Path]) -> None:
    layout = Parallel(micro_batch_size=4)
    models = [folders[key] for key in ("student", "teacher", "data")]
    work = folders["work"] / "beside"
    work.mkdir()
    assert run_ranks(1, distill_losses_beside_a_gpu, PARAMS, layout, *models, work)[0] == _losses(
        "one", layout, **folders
    )


def test_documents_stay_apart_where_their_sequences_are_split(folders: dict[str, Path]) -> None:
    layouts = {"documents": Parallel(micro_batch_size=4), "documents-cp2": Parallel(cp=2, micro_batch_size=4)}
    models = [folders[key] for key in ("student", "teacher", "data")]
    params, found = PARAMS.model_copy(update={"num_steps": 3, "reset_attention_mask": True}), []
    for name, layout in layouts.items():
        work = folders["work"] / name
        work.mkdir()
        found.append(run_ranks(layout.world_size, distill_losses, params, layout, *models, work)[0][0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    open_, _ = _losses("one", Parallel(micro_batch_size=4), **folders)
    assert abs(found[0][0] - open_[0]) > 1e-2, "the mask must matter for this to mean anything"


RESUMES = {
    "states on every rank": (Parallel(dp=2), Parallel(micro_batch_size=2)),
    "states spread": (
        Parallel(dp=2, distributed_optimizer=True),
        Parallel(micro_batch_size=2, distributed_optimizer=True),
    ),
    "states spread, other tp": (
        Parallel(dp=2, distributed_optimizer=True),
        Parallel(tp=2, micro_batch_size=2, distributed_optimizer=True),
    ),
    "states spread over dp beside tp": (OF_RECIPES, Parallel(pp=2, distributed_optimizer=True)),
}
"""Layouts of the first, the last and the steps in between."""


@pytest.mark.parametrize("name", RESUMES)
def test_a_resume_may_have_another_layout(name: str, folders: dict[str, Path]) -> None:
    train, _ = _losses("one", Parallel(micro_batch_size=4), **folders)
    models = (folders["student"], folders["teacher"], folders["data"])
    work = folders["work"] / f"resumed-{name.replace(' ', '-')}"
    work.mkdir()
    outer, inner = RESUMES[name]
    run_ranks(outer.world_size, distill_until, PARAMS, outer, *models, work, 7)
    run_ranks(inner.world_size, distill_until, PARAMS, inner, *models, work, 14)
    found = run_ranks(outer.world_size, distill_until, PARAMS, outer, *models, work, 20)[0]
    np.testing.assert_allclose(found, train, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_distributed_optimizer_resumes_to_the_same_bits(precision: str, folders: dict[str, Path]) -> None:
    params = PARAMS.model_copy(update={"precision": precision, "num_steps": 8, "valid_interval_steps": 4})
    layout = Parallel(dp=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    models = (folders["student"], folders["teacher"], folders["data"])
    works = [folders["work"] / f"{precision}-{name}" for name in ("whole", "stopped")]
    for work in works:
        work.mkdir()
    whole = run_ranks(2, distill_until, params, layout, *models, works[0], 8)[0]
    run_ranks(2, distill_until, params, layout, *models, works[1], 5)
    assert run_ranks(2, distill_until, params, layout, *models, works[1], 8)[0] == whole


def test_the_counters_of_adam_survive_a_resume_beside_a_fused_adam(folders: dict[str, Path]) -> None:
    params = PARAMS.model_copy(update={"num_steps": 6})
    layout = Parallel(micro_batch_size=4, distributed_optimizer=True)
    models = (folders["student"], folders["teacher"], folders["data"])
    works = [folders["work"] / f"fused-{name}" for name in ("whole", "stopped")]
    for work in works:
        work.mkdir()
    whole = run_ranks(1, distill_until, params, layout, *models, works[0], 6)[0]
    run_ranks(1, distill_until_beside_fused_adam, params, layout, *models, works[1], 3)
    assert run_ranks(1, distill_until_beside_fused_adam, params, layout, *models, works[1], 6)[0] == whole


def test_a_checkpoint_of_the_other_optimizer_is_refused(folders: dict[str, Path]) -> None:
    work = folders["work"] / "other-optimizer"
    work.mkdir()
    order = (folders["student"], folders["teacher"], folders["data"], work)
    run_ranks(1, distill_until, PARAMS, Parallel(micro_batch_size=4, distributed_optimizer=True), *order, 2)
    with pytest.raises(AssertionError, match=r"execution\.parallel\.distributed_optimizer = true"):
        run_ranks(1, distill_until, PARAMS, Parallel(micro_batch_size=4), *order, 4)
