"""Shards: the token ids of a piece of text, as one process has made them, with what tells whether they still hold."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.encoder import Encoder
from nemo_minitron.data.pieces import Piece
from nemo_minitron.data.readers import Text, read_documents
from nemo_minitron.errors import DataError
from nemo_minitron.schema.data import DataSource
from nemo_minitron.system.files import sealed, unsealed, write_whole

RECORD = ".shard.json"
"""Ending of the file that makes a shard count; the script of a job looks for it."""
BATCH_CHARS = 1 << 18
MOST_CHARS = 1 << 29
Report = Callable[[int, int], None]
"""report(bytes of files, documents) that were done since the last call; it may raise to stop the work."""


@dataclass(frozen=True)
class Task:
    """What is to be tokenized into one shard."""

    name: str
    """Of the shard's files."""
    piece: Piece
    source: DataSource
    most_documents: int | None


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    ids_file: Path
    documents_file: Path
    num_documents: int

    def documents(self) -> NDArray[np.int64]:
        """[2, N]: tokens (eod included) and UTF-8 bytes of each document."""
        found: NDArray[np.int64] = np.load(self.documents_file, allow_pickle=False)
        return found


@dataclass(frozen=True)
class ShardFolder:
    """Where the shards of a stage are."""

    root: Path
    tokenizer_sha256: str
    """Of everything that decides the ids."""

    def find(self, task: Task) -> Shard | None:
        """The shard, if it was finished for this task and is whole."""
        shard = self._shard(task, 0)
        try:
            record = unsealed(json.loads(self._record(task).read_text(encoding="utf-8")))
            sizes = [file.stat().st_size for file in (shard.ids_file, shard.documents_file)]
        except (OSError, ValueError, AttributeError):
            return None
        if record.get("made_from") != self._made_from(task) or record.get("sizes") != sizes:
            return None
        return self._shard(task, int(record["num_documents"]))

    def make(self, task: Task, encoder: Encoder, report: Report) -> Shard:
        """Read and tokenize; only a whole shard gets a record.

        Raises:
            DataError: as `read_documents`, or an id beyond the vocabulary.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        made_from = self._made_from(task)
        self._record(task).unlink(missing_ok=True)
        shard = self._shard(task, 0)
        lengths, num_bytes = array("q"), array("q")
        with shard.ids_file.open("wb") as out:
            for batch in _batches(_texts(task, report)):
                _require_bounded(batch, task)
                encoded = encoder.encode(batch)
                out.writelines(encoded)
                lengths.extend(len(ids) // encoder.dtype.itemsize for ids in encoded)
                num_bytes.extend(len(text.encode("utf-8")) for text in batch)
            _to_disk(out)
        with shard.documents_file.open("wb") as out:
            np.save(out, np.array([lengths, num_bytes], np.int64), allow_pickle=False)
            _to_disk(out)
        sizes = [file.stat().st_size for file in (shard.ids_file, shard.documents_file)]
        record = {"made_from": made_from, "sizes": sizes, "num_documents": len(lengths)}
        write_whole(self._record(task), json.dumps(sealed(record)))
        return self._shard(task, len(lengths))

    def _shard(self, task: Task, num_documents: int) -> Shard:
        return Shard(self.root / f"{task.name}.ids", self.root / f"{task.name}.documents.npy", num_documents)

    def _record(self, task: Task) -> Path:
        return self.root / f"{task.name}{RECORD}"

    def _made_from(self, task: Task) -> dict[str, Any]:
        made_from = {
            **task.piece.facts(),
            "tokenizer": self.tokenizer_sha256,
            "text_field": task.source.text_field,
            "document_separator": task.source.document_separator,
            "most_documents": task.most_documents,
        }
        return dict(json.loads(json.dumps(made_from)))


def sha256_of(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _texts(task: Task, report: Report) -> Iterator[str]:
    """The documents of a piece, no more than wanted; reports on the way."""
    count = 0
    for file in task.piece.files:
        start, end = task.piece.span or (0, file.stat().st_size)
        done, unreported, unreported_chars = start, 0, 0
        for text in read_documents(file, task.source, task.piece.span):
            yield text.text
            count += 1
            unreported += 1
            unreported_chars += len(text.text)
            if unreported_chars >= BATCH_CHARS:
                report(_until(text, end) - done, unreported)
                done, unreported, unreported_chars = _until(text, end), 0, 0
            if count == task.most_documents:
                report(end - done, unreported)
                return
        report(end - done, unreported)


def _until(text: Text, end: int) -> int:
    return min(text.position_bytes, end)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _require_bounded(texts: list[str], task: Task) -> None:
    """An indexed dataset counts the tokens of a document in 31 bits."""
    longest = max(map(len, texts))
    if longest > MOST_CHARS:
        raise DataError(
            f"A document has {longest:,} characters.",
            where=", ".join(map(str, task.piece.files)),
            allowed=f"at most {MOST_CHARS:,}",
            next_step="Set document_separator for a .txt that holds many documents, or divide it.",
        )


def _to_disk(file: BinaryIO) -> None:
    """The record, which is written next, may not reach the disk before this."""
    file.flush()
    os.fsync(file.fileno())
