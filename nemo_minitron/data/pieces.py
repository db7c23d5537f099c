"""How the files of a source are divided: each piece is tokenized by one process, and kept when a run is stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.blocks import COMPRESSIONS

SMALLEST_BYTES, LARGEST_BYTES = 1 << 22, 1 << 27
_PIECES = 64
"""Wanted of one source, within the limits: enough for many cores, and little to lose in a kill."""
_UNPACKED = 4
"""Size of a text relative to its compressed file, about."""


@dataclass(frozen=True)
class Piece:
    """Some small files of a source, one file, or a stretch of a large .jsonl."""

    files: tuple[Path, ...]
    num_bytes: int
    """On disk."""
    span: tuple[int, int] | None = None
    """Lines that begin at these bytes, of one file; None: whole files."""

    def facts(self) -> dict[str, Any]:
        """What tells this piece from another, and whether its files are as they were."""
        states = [(file, file.stat()) for file in self.files]
        return {"files": [[str(file), at.st_size, at.st_mtime_ns] for file, at in states], "span": self.span}


def divide(files: Sequence[Path]) -> list[Piece]:
    """The pieces of a source, in the order of its documents. They depend on the names and sizes of the files only."""
    sizes = [file.stat().st_size for file in files]
    most = max(SMALLEST_BYTES, min(LARGEST_BYTES, sum(sizes) // _PIECES))
    return list(_pieces(zip(files, sizes, strict=True), most))


def _pieces(files: Iterable[tuple[Path, int]], most: int) -> Iterator[Piece]:
    group: list[Path] = []
    num_bytes = weight = 0
    for file, size in files:
        if file.suffix.lower() == ".jsonl" and size > 2 * most:
            if group:
                yield Piece(tuple(group), num_bytes)
            group, num_bytes, weight = [], 0, 0
            yield from _spans(file, size, most)
            continue
        group.append(file)
        num_bytes += size
        weight += size * (_UNPACKED if file.suffix.lower() in COMPRESSIONS else 1)
        if weight >= most:
            yield Piece(tuple(group), num_bytes)
            group, num_bytes, weight = [], 0, 0
    if group:
        yield Piece(tuple(group), num_bytes)


def _spans(file: Path, size: int, most: int) -> Iterator[Piece]:
    for start in range(0, size, most):
        end = min(start + most, size)
        yield Piece((file,), end - start, (start, end))
