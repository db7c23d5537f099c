"""Files as blocks of bytes, decompressed on the way."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nemo_minitron.errors import DataError, shortened
from nemo_minitron.limits import DOCUMENT_BYTES, UNPACKED_FREE_BYTES, UNPACKED_RATIO, WINDOW_BYTES

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 1 << 20
_PACKED_BYTES = BLOCK_BYTES // 8
_PACKED_AT_ONCE = 2048
"""Of zstd, which unpacks all that it is given: four bytes may become 128 KiB."""


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
        DataError: the compressed data are damaged, end too early, ask for too much memory, or unpack without end.
        OSError: the file cannot be read.
    """
    kind = file.suffix.lower()
    with file.open("rb") as raw:
        if kind in COMPRESSIONS:
            unpack = {".zst": _zstd_blocks, ".xz": _xz_blocks}.get(kind)
            yield from _within_ratio(file, _library_blocks(raw, file, kind) if unpack is None else unpack(raw, file))
        else:
            raw.seek(start)
            yield from (Block(data, raw.tell()) for data in iter(lambda: raw.read(BLOCK_BYTES), b""))


def read_whole(file: Path) -> bytes:
    """All bytes of a file, decompressed.

    Raises:
        DataError: see `read_blocks`; or they are too many.
    """
    blocks, size, most = [], 0, DOCUMENT_BYTES.value()
    for block in read_blocks(file):
        size += len(block.data)
        if size > most:
            raise DataError(
                f"The file has more than {most:,} bytes and would be read as a whole.",
                where=str(file),
                next_step="Write it as .jsonl or .parquet. " + DOCUMENT_BYTES.how_to_raise(),
            )
        blocks.append(block.data)
    return b"".join(blocks)


def _within_ratio(file: Path, blocks: Iterator[Block]) -> Iterator[Block]:
    """Ends what a few bytes would unpack to."""
    packed, unpacked = max(1, file.stat().st_size), 0
    for block in blocks:
        unpacked += len(block.data)
        if unpacked > max(UNPACKED_FREE_BYTES, packed * UNPACKED_RATIO.value()):
            raise DataError(
                f"The file's {packed:,} bytes unpack to more than {UNPACKED_RATIO.value():,} times as many.",
                where=str(file),
                next_step=UNPACKED_RATIO.how_to_raise(),
            )
        yield block


def _library_blocks(raw: IO[bytes], file: Path, kind: str) -> Iterator[Block]:
    kinds: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
    try:
        with kinds[kind](raw, "rb") as stream:
            yield from (Block(data, raw.tell()) for data in iter(lambda: stream.read(BLOCK_BYTES), b""))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(file, str(error)) from error
    except OSError as error:
        # bz2 has no error of its own.
        if error.errno is not None:
            raise
        raise _damaged(file, str(error)) from error


def _xz_blocks(raw: IO[bytes], file: Path) -> Iterator[Block]:
    """By hand: the library's reader takes no limit of memory."""
    packed = raw.read(_PACKED_BYTES)
    if not packed:
        raise _damaged(file, "it is empty")
    try:
        while packed:
            stream = lzma.LZMADecompressor(memlimit=2 * WINDOW_BYTES.value())
            while not stream.eof:
                packed = packed or (raw.read(_PACKED_BYTES) if stream.needs_input else b"")
                if not packed and stream.needs_input:
                    raise _damaged(file, "it ends in the middle")
                data, packed = stream.decompress(packed, BLOCK_BYTES), b""
                if data:
                    yield Block(data, raw.tell())
            packed = _behind_padding(raw, stream.unused_data)
    except lzma.LZMAError as error:
        raise (_wide_window(file) if "Memory usage" in str(error) else _damaged(file, str(error))) from error


def _behind_padding(raw: IO[bytes], packed: bytes) -> bytes:
    """What follows a stream of xz, without the zeros that may stand between two."""
    packed = packed.lstrip(b"\0")
    while not packed and (more := raw.read(_PACKED_BYTES)):
        packed = more.lstrip(b"\0")
    return packed


def _zstd_blocks(raw: IO[bytes], file: Path) -> Iterator[Block]:
    """By hand: the library's stream reader stops silently after the first frame, and at a cut end."""
    import zstandard

    window, frame = WINDOW_BYTES.value(), None
    parts: list[bytes] = []
    size = 0
    try:
        for packed in iter(lambda: raw.read(_PACKED_AT_ONCE), b""):
            while packed:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
                data = frame.decompress(packed)
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                parts.append(data)
                size += len(data)
                if size >= BLOCK_BYTES:
                    yield Block(b"".join(parts), raw.tell())
                    parts, size = [], 0
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise _wide_window(file) from error
        raise _damaged(file, str(error)) from error
    if size:
        yield Block(b"".join(parts), raw.tell())
    if frame is not None:
        raise _damaged(file, "it ends in the middle")


def _wide_window(file: Path) -> DataError:
    return DataError(
        f"Unpacking the file takes more than {WINDOW_BYTES.value():,} bytes of memory.",
        where=str(file),
        next_step=f"Pack it again without --long. {WINDOW_BYTES.how_to_raise()}",
    )


def _damaged(file: Path, reason: str) -> DataError:
    return DataError(
        f"The compressed file is damaged: {shortened(reason)}", where=str(file), next_step="Copy or download it again."
    )
