"""Shards: token ids of a piece of text, with a record that shows whether they are complete and still valid."""

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
"""Suffix of the record file that marks a shard as complete; job scripts look for it."""
BATCH_CHARS = 1 << 18
MAX_DOCUMENT_CHARS = 1 << 29
Report = Callable[[int, int], None]
"""report(bytes of files, documents) processed since the last call; it may raise an exception to stop the work."""


@dataclass(frozen=True)
class Task:
    """Text to tokenize into one shard."""

    name: str
    """Base name of the shard's files."""
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
        """Return tokens (including eod) and UTF-8 bytes of each document, shape [2, N]."""
        found: NDArray[np.int64] = np.load(self.documents_file, allow_pickle=False)
        return found


@dataclass(frozen=True)
class ShardFolder:
    """Folder of a stage's shards."""

    root: Path
    tokenizer_sha256: str
    """Hash of everything that determines the ids."""

    def find(self, task: Task) -> Shard | None:
        """Return the shard if it was finished for exactly this task and its files are complete."""
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
        """Read and tokenize the text of a task; write the record only when the shard is complete.

        Raises:
            DataError: as for `read_documents`, or an id is beyond the vocabulary.
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
            _flush_to_disk(out)
        with shard.documents_file.open("wb") as out:
            np.save(out, np.array([lengths, num_bytes], np.int64), allow_pickle=False)
            _flush_to_disk(out)
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
    """Yield the documents of a piece, at most `task.most_documents`, and report progress."""
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
    """Refuse documents whose number of tokens may not fit into the 31 bits of an indexed dataset."""
    longest = max(map(len, texts))
    if longest > MAX_DOCUMENT_CHARS:
        raise DataError(
            f"A document has {longest:,} characters.",
            where=", ".join(map(str, task.piece.files)),
            allowed=f"at most {MAX_DOCUMENT_CHARS:,}",
            next_step="Set document_separator for a .txt that holds many documents, or split the document.",
        )


def _flush_to_disk(file: BinaryIO) -> None:
    """Write the file to disk, so that the record, written afterward, cannot reach the disk first."""
    file.flush()
    os.fsync(file.fileno())
