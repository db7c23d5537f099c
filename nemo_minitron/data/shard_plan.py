"""Schedule of the shards of a stage: which to make, in which order, and what to do when one cannot be made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_minitron.data.pieces import divide
from nemo_minitron.data.readers import no_document
from nemo_minitron.data.shard_pool import ShardWorkers
from nemo_minitron.data.shards import Shard, ShardFolder, Task
from nemo_minitron.errors import DataError
from nemo_minitron.schema.data import DataSource

POLL_S = 0.25


@dataclass
class SourceShards:
    """Tasks of a source with their results and errors."""

    source: DataSource
    tasks: list[Task]
    shards: dict[int, Shard] = field(default_factory=dict)
    errors: dict[int, tuple[Task, DataError]] = field(default_factory=dict)
    """Number of a task -> the task as it was tried, and its error."""
    started: int = 0
    """Number of the first task that has not been started."""
    finished: int = 0
    """Number of tasks before the first one without a shard, as far as counted."""
    finished_documents: int = 0
    """Documents in the shards of these tasks."""

    def next_task(self) -> tuple[int, Task] | None:
        """Return the next task to start and its number; None if none is needed, or none until others are finished.

        A task that failed is repeated as soon as all tasks before it are finished, with the number of documents that is
        needed from it: text beyond the `max_documents` of a source may be unreadable.

        Raises:
            DataError: text that is needed cannot be read.
        """
        max_documents = self.source.max_documents
        while self.finished in self.shards and (max_documents is None or self.finished_documents < max_documents):
            self.finished_documents += self.shards[self.finished].num_documents
            self.finished += 1
        needed = None if max_documents is None else max_documents - self.finished_documents
        if needed is not None and needed <= 0:
            return None
        if self.finished in self.errors:
            task, error = self.errors.pop(self.finished)
            if task.most_documents == needed:
                raise error
            return self.finished, replace(task, most_documents=needed)
        while self.started in self.shards:
            self.started += 1
        if self.started == len(self.tasks):
            return None
        self.started += 1
        return self.started - 1, self.tasks[self.started - 1]

    @property
    def num_documents(self) -> int:
        count = sum(shard.num_documents for shard in self.shards.values())
        return min(count, self.source.max_documents or count)

    def in_order(self) -> Iterator[tuple[Shard, int]]:
        """Yield (shard, number of its first documents to use).

        Raises:
            DataError: no part of a divided file holds a document.
        """
        left = self.source.max_documents
        of_file: dict[Path, int] = {}
        for number, task in enumerate(self.tasks):
            if left == 0:
                return
            shard = self.shards[number]
            count = shard.num_documents if left is None else min(left, shard.num_documents)
            left = None if left is None else left - count
            if task.piece.span is not None:
                file = task.piece.files[0]
                of_file[file] = of_file.get(file, 0) + count
                if task.piece.span[1] >= file.stat().st_size and of_file[file] == 0:
                    raise no_document(file)
            yield shard, count


def plan_source(number: int, source: DataSource, files: Sequence[Path]) -> SourceShards:
    """Create the tasks of source `number`."""
    pieces = divide(files)
    tasks = [
        Task(f"source_{number:02d}_{index:06d}", piece, source, source.max_documents)
        for index, piece in enumerate(pieces)
    ]
    return SourceShards(source, tasks)


class ShardPlan:
    """All shards of a stage."""

    def __init__(self, sources: Sequence[SourceShards], folder: ShardFolder) -> None:
        self._sources, self._folder = sources, folder

    @property
    def num_tasks(self) -> int:
        return sum(len(source.tasks) for source in self._sources)

    @property
    def num_bytes(self) -> int:
        return sum(task.piece.num_bytes for source in self._sources for task in source.tasks)

    @property
    def bytes_left(self) -> int:
        return sum(
            task.piece.num_bytes
            for source in self._sources
            for number, task in enumerate(source.tasks)
            if number not in source.shards
        )

    def reuse_finished(self) -> int:
        """Reuse the finished shards of an earlier start, and return their number."""
        for source in self._sources:
            found = {number: self._folder.find(task) for number, task in enumerate(source.tasks)}
            source.shards = {number: shard for number, shard in found.items() if shard is not None}
        return sum(len(source.shards) for source in self._sources)

    def run(self, workers: ShardWorkers) -> Iterator[None]:
        """Make the missing shards; yield often, so that the caller can show progress or stop.

        Raises:
            DataError: a text that is needed cannot be read. Texts beyond the `max_documents` of a source may be
                unreadable.
        """
        in_progress: dict[Future[Shard], tuple[SourceShards, int, Task]] = {}
        while True:
            # Keep one task more than there are workers in the queue, so that no worker waits.
            while len(in_progress) < (1 if workers.size == 1 else workers.size + 1):
                following = next(self._next_tasks(), None)
                if following is None:
                    break
                in_progress[workers.submit(following[-1])] = following
                if workers.size == 1:
                    yield
            if not in_progress:
                return
            for future in wait(in_progress, POLL_S, FIRST_COMPLETED).done:
                _record_result(future, *in_progress.pop(future))
            yield

    def _next_tasks(self) -> Iterator[tuple[SourceShards, int, Task]]:
        for source in self._sources:
            if (following := source.next_task()) is not None:
                yield (source, *following)


def _record_result(future: Future[Shard], source: SourceShards, number: int, task: Task) -> None:
    try:
        source.shards[number] = future.result()
    except DataError as error:
        if task.most_documents is None:
            raise
        source.errors[number] = task, error
