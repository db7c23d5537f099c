"""The memory of a step does not grow with the global batch size: targets, batches and masks exist for a round only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.distillation.rounds import round_size, round_sizes
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.distill.params import DistillStage
from tests.support.distributed import run_ranks
from tests.support.live_bytes import LiveBytes
from tests.support.tiny_distill import distill_folders

KEYS: dict[str, Any] = {
    "kind": "distill",
    "num_steps": 4,
    "seq_len_tokens": 64,
    "lr": 1e-3,
    "precision": "fp32",
    "valid_num_tokens": 64,
}
CORRECTION = {"teacher_correction": {"pretraining_lr": 1e-3, "warmup_steps": 0, "lr_schedule": "constant"}}
HIDDEN = {"loss": {"logits": {}, "hidden": {"pairs": [[1, 1]], "weight": 1.0}}}
CASES: dict[str, tuple[Parallel, int, dict[str, Any]]] = {
    "one process": (Parallel(), 4, {}),
    "masks between documents": (Parallel(), 4, {"reset_attention_mask": True}),
    "teacher correction": (Parallel(), 4, {**CORRECTION, **HIDDEN}),
    "pipeline stages": (Parallel(pp=2), 16, HIDDEN),
    "pipeline stages, teacher correction": (Parallel(pp=2), 16, CORRECTION),
}
"""A layout, its smallest global batch size, and more keys."""


def peaks(
    parallel: Parallel, sizes: list[int], keys: dict[str, Any], student: Path, teacher: Path, data: Path, work: Path
) -> list[int]:
    """Return the peak of the bytes that one step of each global batch size allocates on this rank."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    found = []
    with open_session(parallel, device="cpu", threads=1) as session:
        for size in sizes:
            own = work / f"{size}"
            own.mkdir(parents=True, exist_ok=True)
            params = DistillStage.model_validate({**KEYS, **keys, "global_batch_size": size})
            job = distill.prepare(params, student, teacher, data, own, session)
            training.train_step(job, 0)
            with LiveBytes() as live:
                training.train_step(job, 1)
            found.append(live.peak)
    return found


def rows(
    parallel: Parallel, keys: dict[str, Any], student: Path, teacher: Path, data: Path, work: Path
) -> list[dict[str, float]]:
    """Return the curve rows of two steps."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    with open_session(parallel, device="cpu", threads=1) as session:
        params = DistillStage.model_validate({**KEYS, **keys})
        job = distill.prepare(params, student, teacher, data, work, session)
        return [training.train_step(job, step)[0] for step in range(2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return distill_folders(tmp_path_factory.mktemp("peaks"))


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        # Several stages begin with a larger batch: 4 times as much is as large as 16 times that of one process.
        *((name, 16 if parallel.pp == 1 else 4) for name, (parallel, _, _) in CASES.items()),
        *(
            pytest.param(name, 16, marks=pytest.mark.slow)
            for name, (parallel, _, _) in CASES.items()
            if parallel.pp > 1
        ),
    ],
)
def test_the_peak_of_a_step_does_not_grow_with_the_global_batch(
    name: str, largest: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    parallel, smallest, keys = CASES[name]
    sizes = [times * smallest for times in (1, 4, 16) if times <= largest]
    models = (folders["student"], folders["teacher"], folders["data"])
    for rank, found in enumerate(run_ranks(parallel.world_size, peaks, parallel, sizes, keys, *models, tmp_path)):
        print(
            f"{name}, rank {rank}: "
            + ", ".join(f"{size}: {peak / 2**10:.0f} KiB" for size, peak in zip(sizes, found, strict=True))
        )
        assert max(found) <= 1.02 * found[0], (name, rank, found)


@pytest.mark.parametrize("keys", [HIDDEN, CORRECTION, {}], ids=["hidden states", "teacher correction", "plain"])
def test_several_rounds_have_the_gradients_of_one(
    keys: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    keys = {**keys, "global_batch_size": 40}
    assert round_sizes(40, round_size(2, teacher_is_live=True, teacher_learns=False)) == [13, 13, 14]
    models = (folders["student"], folders["teacher"], folders["data"])
    (tmp_path / "one").mkdir()
    expected = run_ranks(1, rows, Parallel(micro_batch_size=8), keys, *models, tmp_path / "one")[0]
    found = run_ranks(2, rows, Parallel(pp=2), keys, *models, tmp_path)[0]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
