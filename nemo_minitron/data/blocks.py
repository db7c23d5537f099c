"""Reading files as blocks of decompressed bytes."""

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
COMPRESSION_RATIO = 4
"""Approximate ratio of the size of a text to its compressed size."""
BLOCK_BYTES = 1 << 20
_PACKED_BYTES = BLOCK_BYTES // 8
_ZSTD_INPUT_BYTES = 2048
"""Input size for zstd, which decompresses all of its input at once: four bytes can become 128 KiB."""


@dataclass(frozen=True)
class Block:
    """Block of decompressed bytes."""

    data: bytes
    position_bytes: int
    """Bytes of the file on disk read so far, including this block."""


def text_bytes(file: Path, num_bytes: int) -> int:
    """Estimate the size of the text in a file from the file's size."""
    return num_bytes * (COMPRESSION_RATIO if file.suffix.lower() in COMPRESSIONS else 1)


def read_blocks(file: Path, start: int = 0) -> Iterator[Block]:
    """Yield the bytes of a file, decompressed according to its suffix.

    Args:
        start: byte to begin at; only for uncompressed files.

    Raises:
        DataError: the compressed data are damaged, truncated, need too much memory, or expand too much.
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
    """Return all bytes of a file, decompressed.

    Raises:
        DataError: as for `read_blocks`, or the file is too large.
    """
    blocks, size, max_bytes = [], 0, DOCUMENT_BYTES.value()
    for block in read_blocks(file):
        size += len(block.data)
        if size > max_bytes:
            raise DataError(
                f"The file has more than {max_bytes:,} bytes; this type of file is read into memory as a whole.",
                where=str(file),
                next_step="Write it as .jsonl or .parquet. " + DOCUMENT_BYTES.how_to_raise(),
            )
        blocks.append(block.data)
    return b"".join(blocks)


def _within_ratio(file: Path, blocks: Iterator[Block]) -> Iterator[Block]:
    """Pass the blocks on; refuse a file that decompresses to far more than its size (a decompression bomb)."""
    packed, unpacked = max(1, file.stat().st_size), 0
    for block in blocks:
        unpacked += len(block.data)
        if unpacked > max(UNPACKED_FREE_BYTES, packed * UNPACKED_RATIO.value()):
            raise DataError(
                f"The {packed:,} bytes of the file decompress to more than {UNPACKED_RATIO.value():,} times as many.",
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
        # bz2 has no error class of its own; it raises OSError without an errno.
        if error.errno is not None:
            raise
        raise _damaged(file, str(error)) from error


def _xz_blocks(raw: IO[bytes], file: Path) -> Iterator[Block]:
    """Decompress xz with the low-level decompressor, because the library's reader has no memory limit."""
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
            packed = _skip_padding(raw, stream.unused_data)
    except lzma.LZMAError as error:
        raise (_window_too_large(file) if "Memory usage" in str(error) else _damaged(file, str(error))) from error


def _skip_padding(raw: IO[bytes], packed: bytes) -> bytes:
    """Return the data after an xz stream, without the zero padding allowed between streams."""
    packed = packed.lstrip(b"\0")
    while not packed and (more := raw.read(_PACKED_BYTES)):
        packed = more.lstrip(b"\0")
    return packed


def _zstd_blocks(raw: IO[bytes], file: Path) -> Iterator[Block]:
    """Decompress zstd frame by frame: the library's stream reader silently stops after one frame or at a cut end."""
    import zstandard

    window, frame = WINDOW_BYTES.value(), None
    parts: list[bytes] = []
    size = 0
    try:
        for packed in iter(lambda: raw.read(_ZSTD_INPUT_BYTES), b""):
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
            raise _window_too_large(file) from error
        raise _damaged(file, str(error)) from error
    if size:
        yield Block(b"".join(parts), raw.tell())
    if frame is not None:
        raise _damaged(file, "it ends in the middle")


def _window_too_large(file: Path) -> DataError:
    return DataError(
        f"Decompressing the file takes more than {WINDOW_BYTES.value():,} bytes of memory.",
        where=str(file),
        next_step=f"Compress it again without --long. {WINDOW_BYTES.how_to_raise()}",
    )


def _damaged(file: Path, reason: str) -> DataError:
    return DataError(
        f"The compressed file is damaged: {shortened(reason)}", where=str(file), next_step="Copy or download it again."
    )
