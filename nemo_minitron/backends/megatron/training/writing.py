"""Write Megatron's checkpoint files from a thread of the trainer.

Megatron itself forks writer processes and hears of them through a third one. A forked writer makes the trainer copy
every page that it touches (slower than writing the file in the first place), and helpers outlive a killed trainer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.runtime.versions import begin_checkpoint, checkpoint_buckets, write_checkpoint_file

Bucket = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]
"""What goes into one file: its path, its name, (bytes, tensors); Megatron's WriteBucket."""
Buffers = dict[Any, Tensor]
"""Copies of tensors by their place in the checkpoint, kept from save to save: fresh memory is slow to get."""


class Writing:
    """A checkpoint that is being written; every rank has its part."""

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.written: dict[str, Any] = {}
        """This rank's files, when it has finished: name -> {bytes, sha256}."""

    @classmethod
    def begin(cls, state: dict[str, Any], folder: Path, buffers: Buffers | None) -> Writing:
        """Copy the state and start to write it. With buffers=None it is not copied: it must stay until `finish`."""
        # In place of a queue that Megatron keeps in another process.
        tell = filesystem_async._results_queue = queue.Queue()
        request = begin_checkpoint(state, folder)
        writing = cls(request)
        if request.async_fn is not None:
            found = checkpoint_buckets(request)
            buckets = found if buffers is None else [_staged(bucket, buffers) for bucket in found]
            writing._thread = threading.Thread(
                target=writing._write, args=(buckets, tell), name="checkpoint", daemon=True
            )
            writing._thread.start()
        return writing

    def then(self, function: Callable[[], None]) -> None:
        """Call it on every rank when all is written."""
        self._request.add_finalize_fn(function)

    @property
    def is_busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self, session: Session) -> None:
        """Wait for every rank; write Megatron's metadata; call what was to come then.

        Raises:
            OSError: on every rank, when one could not write its part.
        """
        if self._thread is not None:
            self._thread.join()
        # Megatron before 0.14 leaves the others waiting for the one that failed.
        failed = session.sum(torch.tensor([float(self._failure is not None)], device=session.device))
        if failed.item():
            raise OSError(str(self._failure or "another process could not write its part")) from self._failure
        for function in self._request.finalize_fns:
            function()

    def _write(self, buckets: list[Bucket], tell: queue.Queue[Any]) -> None:
        """Write this rank's files and take their checksums; the results go to Megatron's queue."""
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
        tell.put(results)


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong before torch stumbled over it when it closed the file."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@torch.no_grad()
def _staged(bucket: Bucket, buffers: Buffers) -> Bucket:
    """The bucket with copies of its tensors."""
    path, name, (blobs, tensors) = bucket
    copies = []
    for item, tensor in tensors:
        buffer = buffers.get(item.index)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = buffers[item.index] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        copies.append((item, buffer.copy_(tensor)))
    return path, name, (blobs, copies)
