"""Division of a source's files into pieces. One process tokenizes a piece; finished pieces survive a stopped run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.blocks import text_bytes

SMALLEST_BYTES, LARGEST_BYTES = 1 << 22, 1 << 27
_PIECES = 64
"""Number of pieces aimed at per source, within the size limits: enough for many cores, and little is lost in a kill."""


@dataclass(frozen=True)
class Piece:
    """Several small files, one file, or a part of a large .jsonl."""

    files: tuple[Path, ...]
    num_bytes: int
    """Size on disk."""
    span: tuple[int, int] | None = None
    """Byte range of one file, for the lines that begin in it; None means whole files."""

    def facts(self) -> dict[str, Any]:
        """Return facts that identify this piece and the state of its files."""
        states = [(file, file.stat()) for file in self.files]
        return {"files": [[str(file), at.st_size, at.st_mtime_ns] for file, at in states], "span": self.span}


def divide(files: Sequence[Path]) -> list[Piece]:
    """Divide files into pieces, in document order. The result depends only on the files' names and sizes."""
    sizes = [file.stat().st_size for file in files]
    piece_bytes = max(SMALLEST_BYTES, min(LARGEST_BYTES, sum(sizes) // _PIECES))
    return list(_pieces(zip(files, sizes, strict=True), piece_bytes))


def _pieces(files: Iterable[tuple[Path, int]], piece_bytes: int) -> Iterator[Piece]:
    group: list[Path] = []
    num_bytes = weight = 0
    for file, size in files:
        if file.suffix.lower() == ".jsonl" and size > 2 * piece_bytes:
            if group:
                yield Piece(tuple(group), num_bytes)
            group, num_bytes, weight = [], 0, 0
            yield from _spans(file, size, piece_bytes)
            continue
        group.append(file)
        num_bytes += size
        weight += text_bytes(file, size)
        if weight >= piece_bytes:
            yield Piece(tuple(group), num_bytes)
            group, num_bytes, weight = [], 0, 0
    if group:
        yield Piece(tuple(group), num_bytes)


def _spans(file: Path, size: int, piece_bytes: int) -> Iterator[Piece]:
    for start in range(0, size, piece_bytes):
        end = min(start + piece_bytes, size)
        yield Piece((file,), end - start, (start, end))
