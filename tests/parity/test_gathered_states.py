"""The states of a distributed optimizer in checkpoints: complete and at their places, however buckets are padded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from nemo_minitron.backends.megatron.runtime import versions
from nemo_minitron.backends.megatron.training import gathered_states
from nemo_minitron.backends.megatron.training.gathered_states import _overlaps, _reserved
from nemo_minitron.schema.execution import Parallel
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import distill_until
from tests.support.tiny_distill import TWENTY_STEPS, distill_folders

PARAMS = TWENTY_STEPS.model_copy(update={"num_steps": 6})
SMALL_BUCKETS = Parallel(dp=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


def distill_in_small_buckets(*args: Any) -> list[float]:
    """Run distill_until with a bucket for each parameter, and gather a few values at a time."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from nemo_minitron.backends.megatron.training import optim

    made = []

    def wrapped(*of_wrapper: Any) -> DistributedDataParallel:
        made.append(DistributedDataParallel(*of_wrapper))
        return made[-1]

    with (
        patch.object(optim, "DistributedDataParallelConfig", partial(DistributedDataParallelConfig, bucket_size=1)),
        patch.object(optim, "DistributedDataParallel", wrapped),
        patch.object(gathered_states, "GATHERED_VALUES", 100),
    ):
        losses = distill_until(*args)
    buckets = made[0].buffers[0].buckets
    padded = [bucket for bucket in buckets[:-1] if bucket.numel_unpadded < bucket.grad_data.numel()]
    assert padded, "padding between buckets must occur for this to mean anything"
    return losses


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return distill_folders(tmp_path_factory.mktemp("gathered"))


@pytest.mark.skipif(
    versions._VERSION < (0, 15),
    reason="another form of states; and Megatron-Core 0.10 gathers a parameter twice if each has a bucket",
)
@pytest.mark.parametrize(
    "then", [SMALL_BUCKETS, Parallel(micro_batch_size=2, distributed_optimizer=True)], ids=["same", "one process"]
)
def test_states_of_padded_buckets_survive_a_resume(then: Parallel, folders: dict[str, Path], tmp_path: Path) -> None:
    models = (folders["student"], folders["teacher"], folders["data"])
    works = [tmp_path / name for name in ("whole", "stopped")]
    for work in works:
        work.mkdir()
    whole = run_ranks(2, distill_in_small_buckets, PARAMS, SMALL_BUCKETS, *models, works[0], 6)[0]
    run_ranks(2, distill_in_small_buckets, PARAMS, SMALL_BUCKETS, *models, works[1], 3)
    goes_on = distill_in_small_buckets if then.dp == 2 else distill_until
    found = run_ranks(then.world_size, goes_on, PARAMS, then, *models, works[1], 6)[0]
    np.testing.assert_allclose(found, whole, atol=0.0 if then.dp == 2 else 1e-4)


def test_a_rank_without_held_out_text_holds_up_no_other(folders: dict[str, Path], tmp_path: Path) -> None:
    models = (folders["student"], folders["teacher"], folders["data"])
    one_sequence = PARAMS.model_copy(update={"valid_num_tokens": PARAMS.seq_len_tokens})
    losses = run_ranks(2, distill_until, one_sequence, SMALL_BUCKETS, *models, tmp_path, 1)[0]
    assert len(losses) == 1


def test_memory_is_taken_where_it_is_written() -> None:
    size = 2**30
    before = _resident_bytes()
    whole = _reserved(size)
    assert whole.shape == (size,)
    whole[2**29 : 2**29 + 1000] = 1.0
    assert float(whole[2**29 - 5 : 2**29 + 5].sum()) == 5.0
    assert _resident_bytes() - before < 2**26, "4 GiB are reserved, not used"
    assert torch.equal(_reserved(0), torch.zeros(0))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_overlaps_with_a_range() -> None:
    intervals = [(2, 5), (5, 6), (9, 12)]
    assert list(_overlaps(intervals, 0, 20)) == intervals
    assert list(_overlaps(intervals, 3, 10)) == [(3, 5), (5, 6), (9, 10)]
    assert list(_overlaps(intervals, 6, 9)) == []
    assert list(_overlaps(intervals, 10, 11)) == [(10, 11)]
    assert list(_overlaps([], 0, 5)) == []
