"""What a training costs by the number of ranks, counted at 1, 2, 4 and 8 ranks, and continued to 256.

Independent of their number are the bytes that all ranks together read at the start and at a resume, and write at a
save, and what each rank communicates in a step. The memory of a save is divided by it.
"""

from __future__ import annotations

import builtins
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nemo_minitron.backends.megatron.training import gathered_states
from nemo_minitron.schema.execution import Parallel
from tests.support.distributed import run_ranks
from tests.support.live_bytes import LiveBytes
from tests.support.tiny_distill import TWENTY_STEPS, distill_folders
from tests.support.vector_bytes import VectorBytes

PARAMS = TWENTY_STEPS.model_copy(update={"global_batch_size": 8})
COUNTS = (1, 2, 4, 8)
KINDS = ("start", "saved", "resumed", "step", "host", "agreed", "agreed later")
"""Read at the start, written at a save, read at a resume; vectors of a step's collective operations; memory of a save,
including the gathered states of a distributed optimizer; what each rank exchanges about a save other than states,
the first time and later."""
MANY = 256
Bytes = dict[str, int]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return distill_folders(tmp_path_factory.mktemp("bytes"))


@contextmanager
def _bytes_of_weights(found: Bytes) -> Iterator[None]:
    """Count the bytes of the tensors that are read from model files."""
    from nemo_minitron.hf.checkpoint import Checkpoint

    plain = Checkpoint.read

    def read(self: Checkpoint, *args: Any) -> Any:
        tensor = plain(self, *args)
        found["start"] += tensor.numel() * tensor.element_size()
        return tensor

    with patch.object(Checkpoint, "read", read):
        yield


class _Counted(io.BufferedReader):
    """A file that counts the bytes that are read from it."""

    def __init__(self, raw: io.RawIOBase, found: Bytes) -> None:
        super().__init__(raw)
        self.found = found

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.found["resumed"] += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer)
        self.found["resumed"] += count
        return count


@contextmanager
def _bytes_of_tensor_files(found: Bytes) -> Iterator[None]:
    """Count the bytes that torch reads from the files of a distributed checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    plain = FileSystem.create_stream

    @contextmanager
    def create_stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        if "w" in mode or Path(path).suffix != ".distcp":
            with plain(self, path, mode) as stream:
                yield stream
        else:
            with builtins.open(path, "rb", buffering=0) as raw, _Counted(raw, found) as stream:
                yield stream

    with patch.object(FileSystem, "create_stream", create_stream):
        yield


@contextmanager
def _bytes_of_gathered_states(found: Bytes) -> Iterator[None]:
    """Count the states that this rank collects to write them: their memory is not made by torch."""
    plain = gathered_states.GatheredStates._written

    def written(self: gathered_states.GatheredStates, state: Any) -> Any:
        out = plain(self, state)
        found["host"] += 4 * sum(stop - start for of in out for parts in of.values() for start, stop in parts)
        return out

    with (
        patch.object(gathered_states.GatheredStates, "_written", written),
        patch.object(gathered_states, "GATHERED_VALUES", 1024),
    ):
        yield


def _count_two_saves(saved: Any, trainable: Any, found: Bytes) -> None:
    """Save twice: memory of the first save, and what each rank exchanges about both."""
    from nemo_minitron.backends.megatron.training.checkpoint import TrainingProgress

    with LiveBytes() as live, VectorBytes() as first, _bytes_of_gathered_states(found):
        saved.save(trainable, TrainingProgress(2))
    found["host"] += live.peak
    saved.finish()
    with VectorBytes() as second:
        saved.save(trainable, TrainingProgress(2))
    for kind, vectors in (("agreed", first), ("agreed later", second)):
        found[kind] = vectors.total - vectors.of_operation["_allgather_base_"]


def traffic(parallel: Parallel, student: Path, teacher: Path, data: Path, work: Path) -> tuple[Bytes, list[float]]:
    """Return the bytes of this rank, and the losses of three steps, the last of which follows a resume."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training
    from nemo_minitron.backends.megatron.training.checkpoint import Checkpoints

    found = dict.fromkeys(KINDS, 0)
    with open_session(parallel, device="cpu", threads=1) as session, _bytes_of_weights(found):
        job = distill.prepare(PARAMS, student, teacher, data, work, session)
        saved = Checkpoints(work / "checkpoints", session, keep=1, in_background=True)
        losses = [training.train_step(job, 0)[0]["train_loss"]]
        with VectorBytes() as vectors:
            losses.append(training.train_step(job, 1)[0]["train_loss"])
        found["step"] = vectors.total
        job.trainable.gather_parameters()
        _count_two_saves(saved, job.trainable, found)
        pending = saved._pending
        assert pending is not None
        saved.finish()
        found["saved"] = sum(facts["bytes"] for facts in pending.written.values())
        start = found["start"]
        again = distill.prepare(PARAMS, student, teacher, data, work, session)
        with _bytes_of_tensor_files(found):
            assert (
                Checkpoints(work / "checkpoints", session, keep=1, in_background=True).resume(again.trainable).step == 2
            )
        losses.append(training.train_step(again, 2)[0]["train_loss"])
    return {**found, "start": start}, losses


@pytest.mark.parametrize(
    "distributed",
    [pytest.param(False, id="plain optimizer", marks=pytest.mark.slow), pytest.param(True, id="distributed optimizer")],
)
def test_all_ranks_together_move_what_one_would(distributed: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    models = (folders["student"], folders["teacher"], folders["data"])
    totals: dict[int, Bytes] = {}
    most: dict[int, Bytes] = {}
    losses: dict[int, list[float]] = {}
    for count in COUNTS:
        work = tmp_path / f"{count}"
        work.mkdir()
        layout = Parallel(dp=count, distributed_optimizer=distributed)
        ranks = run_ranks(count, traffic, layout, *models, work)
        totals[count] = {kind: sum(found[kind] for found, _ in ranks) for kind in KINDS}
        most[count] = {kind: max(found[kind] for found, _ in ranks) for kind in KINDS}
        losses[count] = ranks[0][1]
    print({"distributed": distributed, "totals": totals, "largest of a rank": most})
    for count in COUNTS[1:]:
        assert totals[count]["start"] == totals[1]["start"]
        assert losses[count] == pytest.approx(losses[1], abs=1e-4)
        for kind in ("saved", "resumed"):
            # Headers of files and of tensors are small, but there are more of them.
            assert totals[count][kind] == pytest.approx(totals[1][kind], rel=0.1), (kind, count)
            assert most[count][kind] < 1.5 * totals[1][kind] / count, "the shares are nearly equal"
        assert most[count]["step"] == pytest.approx(most[2]["step"], rel=0.02)
        # What is gathered at a time is the same for any number of ranks.
        assert most[count]["host"] < 1.5 * most[1]["host"] / count + 32 * 2**10
    _print_at_256(totals, most)


def _print_at_256(totals: dict[int, Bytes], most: dict[int, Bytes]) -> None:
    """Continue the last two counts to 256 ranks, and bound what grows: headers, and what ranks agree on for a save."""
    few, many = COUNTS[-2:]
    each = {kind: (totals[many][kind] - totals[few][kind]) / (many - few) for kind in ("start", "saved", "resumed")}
    agreed = {kind: (most[many][kind] - most[few][kind]) / (many - few) for kind in ("agreed", "agreed later")}
    print({"bytes more by each rank": each, "exchanged about a save, by each rank": agreed})
    assert each["start"] == 0
    for kind in ("saved", "resumed"):
        assert each[kind] * MANY < 16 * 2**20, kind
    assert agreed["agreed later"] < 0.5 * agreed["agreed"]
    assert agreed["agreed later"] * MANY < 16 * 2**20
