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
    errors: dict[int, DataError] = field(default_factory=dict)

    def has_enough(self) -> bool:
        """Return whether the finished shards before the first missing one hold `max_documents`."""
        max_documents, count = self.source.max_documents, 0
        if max_documents is None:
            return False
        for number in range(len(self.tasks)):
            if number not in self.shards:
                return False
            count += self.shards[number].num_documents
            if count >= max_documents:
                return True
        return False

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
        waiting = iter([(source, number) for source in self._sources for number in range(len(source.tasks))])
        in_progress: dict[Future[Shard], tuple[SourceShards, int]] = {}
        while True:
            # Keep one task more than there are workers in the queue, so that no worker waits.
            while len(in_progress) < (1 if workers.size == 1 else workers.size + 1):
                following = next((entry for entry in waiting if _is_needed(*entry)), None)
                if following is None:
                    break
                source, number = following
                in_progress[workers.submit(source.tasks[number])] = following
                if workers.size == 1:
                    yield
            if not in_progress:
                break
            for future in wait(in_progress, POLL_S, FIRST_COMPLETED).done:
                _record_result(future, *in_progress.pop(future))
            yield
        for source in self._sources:
            yield from self._retry_failed(source, workers)

    def _retry_failed(self, source: SourceShards, workers: ShardWorkers) -> Iterator[None]:
        """Retry the shards that failed, as far as their documents are among the first `max_documents`."""
        count = 0
        for number, task in enumerate(source.tasks):
            max_documents = source.source.max_documents
            if max_documents is not None and count >= max_documents:
                return
            if number in source.errors:
                assert max_documents is not None
                future = workers.submit(replace(task, most_documents=max_documents - count))
                while not future.done():
                    wait([future], POLL_S)
                    yield
                source.shards[number] = future.result()
            count += source.shards[number].num_documents


def _is_needed(source: SourceShards, number: int) -> bool:
    return number not in source.shards and not source.has_enough()


def _record_result(future: Future[Shard], source: SourceShards, number: int) -> None:
    try:
        source.shards[number] = future.result()
    except DataError as error:
        if source.source.max_documents is None:
            raise
        source.errors[number] = error
