"""Micro-batches of a training, read ahead of the training step in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from nemo_minitron.backends.megatron.data.datasets import host_batch, training_batch
from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.runtime.session import Session

READ_AHEAD = 8
"""Micro-batches in host memory that no step has requested yet."""


class MicroBatchReader:
    """Yields this rank's micro-batches of each step; the next ones are read meanwhile, across the bounds of steps.

    Only the thread reads the samples. On CUDA it puts them into pinned memory, so that the copy to the device does not
    block. Attention masks are made on the device when a micro-batch is requested, so few of them exist at a time.

    Args:
        num_steps: samples of later steps are not read ahead.
        separate_at: end-of-document token that attention may not cross; None: packed samples are one text.
    """

    def __init__(
        self,
        samples: Any,
        session: Session,
        *,
        num_steps: int,
        global_batch_size: int,
        separate_at: int | None = None,
    ) -> None:
        self._samples, self._session, self._separate_at = samples, session, separate_at
        self._global_batch_size, self._per_rank = global_batch_size, global_batch_size // session.parallel.dp
        self.num_micro_batches = self._per_rank // session.parallel.micro_batch_size
        self._total = num_steps * self.num_micro_batches
        self._executor: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()

    def step(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of one optimizer step (0-based)."""
        first = step * self.num_micro_batches
        for number in range(first, first + self.num_micro_batches):
            yield training_batch(self._take(number), self._session, self._separate_at)

    def close(self) -> None:
        """Stop reading. A later `step` starts again."""
        self._forget()
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None

    def _take(self, number: int) -> Batch:
        if self._ahead and self._ahead[0][0] != number:
            self._forget()
        following = self._ahead[-1][0] + 1 if self._ahead else number
        for ahead in range(following, min(number + READ_AHEAD + 1, max(self._total, number + 1))):
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, "samples", initializer=self._enter_thread)
            self._ahead.append((ahead, self._executor.submit(self._read, ahead)))
        return self._ahead.popleft()[1].result()

    def _enter_thread(self) -> None:
        """Select this rank's GPU, so that pinned memory does not open a context on the first one."""
        if self._session.on_gpu:
            torch.cuda.set_device(self._session.device)

    def _read(self, number: int) -> Batch:
        step, place = divmod(number, self.num_micro_batches)
        size = self._session.parallel.micro_batch_size
        first = step * self._global_batch_size + self._session.dp_rank * self._per_rank + place * size
        return host_batch(self._samples, range(first, first + size), pinned=self._session.on_gpu)

    def _forget(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
