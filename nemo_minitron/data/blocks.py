"""Files as blocks of bytes, decompressed on the way."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemo_minitron.errors import DataError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 1 << 20
_PACKED_BYTES = BLOCK_BYTES // 8
"""Of zstd at a time: it unpacks to 3 to 10 times as much text."""
_MAX_WINDOW_BYTES = 1 << 31
"""`zstd --long=31` needs it."""


@dataclass(frozen=True)
class Block:
    """A run of decompressed bytes."""

    data: bytes
    position_bytes: int
    """How much of the file on disk was read for it and all before it."""


def read_blocks(file: Path, start: int = 0) -> Iterator[Block]:
    """The bytes of a file, decompressed by its suffix.

    Args:
        start: of a file that is not compressed, where to begin.

    Raises:
        DataError: the compressed data are damaged or end too early.
        OSError: the file cannot be read.
    """
    kind = file.suffix.lower()
    with file.open("rb") as raw:
        if kind == ".zst":
            yield from _zstd_blocks(raw, file)
        elif kind in COMPRESSIONS:
            yield from _library_blocks(raw, file, kind)
        else:
            raw.seek(start)
            yield from (Block(data, raw.tell()) for data in iter(lambda: raw.read(BLOCK_BYTES), b""))


def _library_blocks(raw: IO[bytes], file: Path, kind: str) -> Iterator[Block]:
    kinds: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        with kinds[kind](raw, "rb") as stream:
            yield from (Block(data, raw.tell()) for data in iter(lambda: stream.read(BLOCK_BYTES), b""))
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, str(error)) from error
    except OSError as error:
        # bz2 has no error of its own.
        if error.errno is not None:
            raise
        raise _damaged(file, str(error)) from error


def _zstd_blocks(raw: IO[bytes], file: Path) -> Iterator[Block]:
    """By hand: the library's stream reader stops silently after the first frame, and at a cut end."""
    import zstandard

    frame = None
    try:
        for packed in iter(lambda: raw.read(_PACKED_BYTES), b""):
            while packed:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
                data = frame.decompress(packed)
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                if data:
                    yield Block(data, raw.tell())
    except zstandard.ZstdError as error:
        raise _damaged(file, str(error)) from error
    if frame is not None:
        raise _damaged(file, "it ends in the middle")


def _damaged(file: Path, reason: str) -> DataError:
    return DataError(
        f"The compressed file is damaged: {reason}", where=str(file), next_step="Copy or download it again."
    )
