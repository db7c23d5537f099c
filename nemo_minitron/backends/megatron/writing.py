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
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.backends.megatron.session import Session

Bucket = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]
"""What goes into one file: its path, its name, (bytes, tensors); Megatron's WriteBucket."""
Buffers = dict[Any, Tensor]
"""Copies of tensors by their place in the checkpoint, kept from save to save: fresh memory is slow to get."""


class Writing:
    """A checkpoint that is being written; every rank has its part."""

    def __init__(self, request: AsyncRequest, thread: threading.Thread | None, written: dict[str, Any]) -> None:
        self._request, self._thread = request, thread
        self.written = written
        """This rank's files, when it has finished: name -> {bytes, sha256}."""

    @classmethod
    def begin(cls, state: dict[str, Any], folder: Path, buffers: Buffers | None) -> Writing:
        """Copy the state and start to write it. With buffers=None it is not copied: it must stay until `finish`."""
        # In place of a queue that Megatron keeps in another process.
        filesystem_async._results_queue = queue.Queue()
        request = dist_checkpointing.save(state, str(folder), async_sharded_save=True)
        if request.async_fn is None:
            return cls(request, None, {})
        found = request.preload_fn() if request.preload_fn is not None else request.async_fn_args[1]
        buckets = found if buffers is None else [_staged(bucket, buffers) for bucket in found]
        written: dict[str, Any] = {}
        thread = threading.Thread(target=_write, args=(request, buckets, written), name="checkpoint", daemon=True)
        thread.start()
        return cls(request, thread, written)

    def then(self, function: Callable[[], None]) -> None:
        """Call it on every rank when all is written."""
        self._request.add_finalize_fn(function)

    @property
    def is_busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self, session: Session) -> None:
        """Wait for every rank; write Megatron's metadata; call what was to come then."""
        if self._thread is not None:
            self._thread.join()
        session.barrier()
        for function in self._request.finalize_fns:
            function()


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


def _write(request: AsyncRequest, buckets: list[Bucket], checked: dict[str, Any]) -> None:
    """Write this rank's files and take their checksums; the results, or the first error, go to Megatron's queue."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    # Newer versions of Megatron pass transforms of the stream first.
    leading = getattr(request.async_fn, "args", ())[:1]
    results: dict[int, Any] = {}
    answer: Any = results
    for number, bucket in enumerate(buckets):
        told: queue.Queue[Any] = queue.Queue()
        open_jobs: queue.Queue[int] = queue.Queue()
        open_jobs.put(number)
        write(*leading, number, bucket, told, open_jobs, True)
        _, written = told.get()
        if isinstance(written, Exception):
            answer = written
            break
        results[number] = written
    if answer is results:
        try:
            found = file_facts(Path(bucket[0]) for bucket in buckets)
            checked.update({file.name: facts for file, facts in found.items()})
        except OSError as error:
            answer = error
    request.async_fn_args[2].put(answer)
