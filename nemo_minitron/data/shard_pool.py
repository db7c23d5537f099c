"""Tokenize shards in a pool of worker processes, or in this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_minitron.data.encoder import Encoder
from nemo_minitron.data.shards import Shard, ShardFolder, Task
from nemo_minitron.data.tokenization import DocumentTokenizer
from nemo_minitron.errors import EnvironmentProblem, Interrupted
from nemo_minitron.processes.same_code import safe_path_of_children
from nemo_minitron.system.cores import usable_cores
from nemo_minitron.system.interrupts import exit_without_parent

BYTES_PER_PROCESS = 1 << 22
"""Smallest amount of text per worker process; less is not worth the second that a process takes to start."""
_BYTES, _DOCUMENTS, _STOP = 0, 1, 2


def processes_for(size_bytes: int, workers: int | None) -> int:
    """Return the number of processes worth starting for this much text; 1 means to work in the calling process.

    Args:
        workers: upper limit; None means one for each usable core.
    """
    return max(1, min(workers or usable_cores(), size_bytes // BYTES_PER_PROCESS))


@dataclass(frozen=True)
class WorkerSettings:
    """Settings that every worker process needs to make shards."""

    folder: ShardFolder
    tokenizer: DocumentTokenizer
    dtype: str
    where: str
    """Folder of the tokenizer."""

    def encoder(self) -> Encoder:
        return self.tokenizer.encoder(self.dtype, self.where)


class ShardWorkers(Protocol):
    """Interface of the workers that make shards."""

    size: int
    """Number of shards that are made at a time."""

    def submit(self, task: Task) -> Future[Shard]: ...

    def done(self) -> tuple[int, int]:
        """Return (bytes of files, documents) processed since the start."""


@contextmanager
def shard_workers(work: WorkerSettings, num_processes: int, check_stop: Callable[[], None]) -> Iterator[ShardWorkers]:
    """Provide workers that make shards, and stop them when the block ends, also after an error.

    Args:
        check_stop: called often in this process; raises an exception to stop the work.

    Raises:
        EnvironmentProblem: a worker process was killed.
    """
    if num_processes == 1:
        yield _InProcess(work, check_stop)
        return
    # The pool's locks also start a process: the resource tracker, which removes them after a crash.
    with safe_path_of_children():
        workers = _Pool(work, num_processes)
        try:
            yield workers
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                "A tokenizer process was killed.",
                next_step="Check that there is enough memory; execution.workers sets the number of processes.",
            ) from error
        finally:
            workers.close()


class _InProcess:
    """Makes shards in this process; a task is finished when `submit` returns."""

    size = 1

    def __init__(self, work: WorkerSettings, check_stop: Callable[[], None]) -> None:
        self._work, self._check_stop = work, check_stop
        self._encoder = work.encoder()
        self._counts = [0, 0]

    def submit(self, task: Task) -> Future[Shard]:
        future: Future[Shard] = Future()
        try:
            future.set_result(self._work.folder.make(task, self._encoder, self._report))
        except Interrupted:
            raise
        except Exception as error:
            future.set_exception(error)
        return future

    def done(self) -> tuple[int, int]:
        return self._counts[_BYTES], self._counts[_DOCUMENTS]

    def _report(self, num_bytes: int, documents: int) -> None:
        self._counts[_BYTES] += num_bytes
        self._counts[_DOCUMENTS] += documents
        self._check_stop()


class _Pool:
    def __init__(self, work: WorkerSettings, num_processes: int) -> None:
        self.size = num_processes
        # Spawn, do not fork: the threads and locks of torch and tokenizers do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._counts = context.Array("q", 3)
        threads = max(1, usable_cores() // num_processes)
        self._executor = ProcessPoolExecutor(
            num_processes, context, initializer=_start_worker, initargs=(work, self._counts, threads)
        )

    def submit(self, task: Task) -> Future[Shard]:
        return self._executor.submit(_make_in_worker, task)

    def done(self) -> tuple[int, int]:
        return self._counts[_BYTES], self._counts[_DOCUMENTS]

    def close(self) -> None:
        self._counts[_STOP] = 1
        self._executor.shutdown(cancel_futures=True)


# --- inside a worker process --------------------------------------------------------------------


class _Worker:
    """State of a worker process, set once when it starts."""

    work: WorkerSettings
    encoder: Encoder
    counts: Any


def _start_worker(work: WorkerSettings, counts: Any, threads: int) -> None:
    exit_without_parent()
    # Ctrl-C and a hang-up reach every process of the terminal; the main process stops the workers itself.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The threads of the tokenizers library work only for tokenizers that need whole documents. The library reads
    # these variables when it starts them.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    _Worker.work, _Worker.encoder, _Worker.counts = work, work.encoder(), counts


def _make_in_worker(task: Task) -> Shard:
    return _Worker.work.folder.make(task, _Worker.encoder, _report_in_worker)


def _report_in_worker(num_bytes: int, documents: int) -> None:
    counts = _Worker.counts
    with counts.get_lock():
        counts[_BYTES] += num_bytes
        counts[_DOCUMENTS] += documents
    if counts[_STOP]:
        raise Interrupted("The main process requested a stop.")
