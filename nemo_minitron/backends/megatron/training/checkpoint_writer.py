"""The writer of training checkpoints: Megatron's files, written from a thread of the trainer.

Megatron's own asynchronous writer forks processes. After a fork, the trainer copies every page that it touches, which
is slower than writing the file, and the forked processes outlive a killed trainer.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.runtime.versions import (
    SaveStrategy,
    begin_checkpoint,
    checkpoint_buckets,
    write_checkpoint_file,
)
from nemo_minitron.backends.megatron.training.gathered_states import GatheredStates

Bucket = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]
"""Content of one file: path, name, (bytes, tensors); Megatron's WriteBucket."""
Buffers = dict[Any, Tensor]
"""Index in the checkpoint -> copy of the tensor. Reused by later saves, because allocating memory is slow."""


class PendingCheckpoint:
    """A checkpoint that is being written; every rank writes its part."""

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.written: dict[str, Any] = {}
        """This rank's files, filled when they are written: name -> {bytes, sha256}."""

    @classmethod
    def begin(
        cls,
        state: dict[str, Any],
        gathered: Sequence[GatheredStates],
        folder: Path,
        strategy: SaveStrategy,
        buffers: Buffers | None,
    ) -> PendingCheckpoint:
        """Start writing a copy of the state. With buffers=None it is not copied and must not change until `finish`.

        Args:
            gathered: states of optimizers whose tensors have no values yet.
        """
        # Replaces the queue that Megatron keeps in a separate process.
        results_queue = filesystem_async._results_queue = queue.Queue()
        collect = lambda distributed: [one.collect(distributed) for one in gathered]  # noqa: E731
        request = begin_checkpoint(state, folder, strategy, collect)
        pending = cls(request)
        if request.async_fn is not None:
            buckets = checkpoint_buckets(request, on_host=buffers is None)
            if buffers is not None:
                buckets = _staged(buckets, buffers)
            pending._thread = threading.Thread(
                target=pending._write, args=(buckets, results_queue), name="checkpoint", daemon=True
            )
            pending._thread.start()
        return pending

    def on_complete(self, function: Callable[[], None]) -> None:
        """Register a function that every rank calls when all files are written."""
        self._request.add_finalize_fn(function)

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self, session: Session) -> None:
        """Wait for every rank, write Megatron's metadata, and call the registered functions.

        Raises:
            OSError: on every rank, if any rank could not write its part.
        """
        if self._thread is not None:
            self._thread.join()
        # Before 0.14 the other ranks would wait forever for one that failed.
        failed = session.sum(torch.tensor([float(self._failure is not None)], device=session.device))
        if failed.item():
            raise OSError(str(self._failure or "another process could not write its part")) from self._failure
        for function in self._request.finalize_fns:
            function()

    def _write(self, buckets: list[Bucket], results_queue: queue.Queue[Any]) -> None:
        """Write this rank's files, compute their checksums, and put the results into Megatron's queue."""
        results: dict[int, Any] = {}
        for number, bucket in enumerate(buckets):
            results[number] = write_checkpoint_file(self._request, number, bucket)
            if isinstance(results[number], Exception):
                self._failure = _first_cause(results[number])
                return
        try:
            found = file_facts(Path(bucket[0]) for bucket in buckets)
        except OSError as error:
            self._failure = error
            return
        self.written.update({file.name: facts for file, facts in found.items()})
        results_queue.put(results)


def _first_cause(error: BaseException) -> BaseException:
    """Return the original error; torch raises another one when it closes the file."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@torch.no_grad()
def _staged(buckets: list[Bucket], buffers: Buffers) -> list[Bucket]:
    """Return the buckets with copies of their tensors in host memory, which is the only copy that is made."""
    staged, on_gpu = [], False
    for path, name, (blobs, tensors) in buckets:
        copies = []
        for item, tensor in tensors:
            buffer = buffers.get(item.index)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = buffers[item.index] = _host_buffer(tensor)
            copies.append((item, buffer.copy_(tensor, non_blocking=True)))
            on_gpu |= tensor.is_cuda
        staged.append((path, name, (blobs, copies)))
    if on_gpu:
        torch.cuda.synchronize()
    return staged


def _host_buffer(tensor: Tensor) -> Tensor:
    """Return uninitialized host memory for a tensor, page-locked if the tensor is on a GPU.

    The memory is registered with CUDA, because torch's own pinned memory is rounded up to powers of two. If it cannot
    be registered, copies are slower.
    """
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.is_cuda and buffer.nbytes:
        cuda = torch.cuda.cudart()
        if int(cuda.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0:
            weakref.finalize(buffer, cuda.cudaHostUnregister, buffer.data_ptr())
    return buffer
