"""Micro-batches of a training: the same as those of a whole step, read ahead, with few masks at a time."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_minitron.backends.megatron.data import reader
from nemo_minitron.backends.megatron.data.datasets import step_batches
from nemo_minitron.backends.megatron.data.reader import READ_AHEAD, MicroBatchReader
from nemo_minitron.schema.execution import Parallel

LENGTH = 16


class Samples:
    """Samples that record who reads them."""

    def __init__(self, size: int) -> None:
        self.size, self.read, self.threads = size, list[int](), set[str]()

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if number >= self.size:
            raise IndexError(number)
        self.read.append(number)
        self.threads.add(threading.current_thread().name)
        tokens = torch.arange(LENGTH) + number
        return {"tokens": tokens % 5, "labels": tokens + 1, "loss_mask": torch.ones(LENGTH)}


def _session(dp: int = 1, dp_rank: int = 0, micro: int = 2) -> Any:
    return SimpleNamespace(
        parallel=Parallel(dp=dp, micro_batch_size=micro), dp_rank=dp_rank, device=torch.device("cpu"), on_gpu=False
    )


@pytest.mark.parametrize("separate_at", [None, 0])
@pytest.mark.parametrize("dp", [1, 2])
def test_the_batches_are_those_of_a_whole_step(dp: int, separate_at: int | None) -> None:
    samples = Samples(32)
    for dp_rank in range(dp):
        session = _session(dp, dp_rank)
        made = MicroBatchReader(samples, session, num_steps=4, global_batch_size=8, separate_at=separate_at)
        for step in (0, 1, 3, 2):
            whole = step_batches(
                samples, session, step=step, global_batch_size=8, micro_batch_size=2, separate_at=separate_at
            )
            found = list(made.step(step))
            assert len(found) == len(whole) == made.num_micro_batches
            for batch, expected in zip(found, whole, strict=True):
                assert batch.keys() == expected.keys()
                assert all(torch.equal(batch[key], expected[key]) for key in expected)
        made.close()


def test_the_next_micro_batches_are_read_meanwhile_across_steps_but_not_past_the_end() -> None:
    samples = Samples(64)
    made = MicroBatchReader(samples, _session(), num_steps=4, global_batch_size=8)
    batches = made.step(0)
    next(batches)
    expected = 2 * (1 + READ_AHEAD)
    until = time.monotonic() + 10
    while len(samples.read) < expected and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert samples.read == list(range(expected)), "two steps ahead, and no more"
    list(batches)
    for step in range(1, 4):
        list(made.step(step))
    made.close()
    assert samples.read == list(range(32)), "each sample once, none of a fifth step"
    assert threading.current_thread().name not in samples.threads


def test_masks_are_made_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = reader.training_batch
    monkeypatch.setattr(reader, "training_batch", lambda *args: made.append(1) or plain(*args))
    batches = MicroBatchReader(Samples(64), _session(), num_steps=1, global_batch_size=64, separate_at=0).step(0)
    next(batches)
    assert len(made) == 1


def test_an_error_of_the_samples_reaches_the_step() -> None:
    batches = MicroBatchReader(Samples(3), _session(), num_steps=2, global_batch_size=4).step(0)
    next(batches)
    with pytest.raises(IndexError):
        next(batches)


def test_batches_on_a_gpu_come_from_pinned_memory_of_its_own_context(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, selected, plain = list[bool](), list[tuple[str, Any]](), reader.host_batch

    def host_batch(samples: Any, numbers: range, *, pinned: bool) -> Any:
        # Readers of earlier tests may still be reading ahead in their threads.
        if samples is own:
            recorded.append(pinned)
        return plain(samples, numbers)

    recorded, own = pinned, Samples(8)
    monkeypatch.setattr(reader, "host_batch", host_batch)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: selected.append((threading.current_thread().name, device))
    )
    session = _session()
    session.on_gpu = True
    next(MicroBatchReader(own, session, num_steps=1, global_batch_size=4).step(0))
    assert recorded
    assert all(recorded)
    assert [device for _, device in selected] == [session.device]
    assert selected[0][0].startswith("samples")
