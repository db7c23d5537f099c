"""A walk through a GGUF file's header that never leaves the file.

The gguf package believes every count that it reads: in a damaged file a wrong one keeps it busy for hours.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SIZES_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type -> size, for those of fixed size."""
_MAX_DIMS = 4


def require_sound_header(file: Path) -> None:
    """Every count and length of the header stays within the file.

    Raises:
        ValueError: it does not, or this is no GGUF file.
    """
    if file.stat().st_size == 0:
        raise ValueError("the file is empty")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    """A position in the file, moved forward by each read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> None:
        if self.data[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version, num_tensors, num_values = self.number("<I"), self.number("<Q"), self.number("<Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        for _ in range(num_values):
            self.string()
            self.value(self.number("<I"))
        for _ in range(num_tensors):
            self.string()
            num_dims = self.number("<I")
            if num_dims > _MAX_DIMS:
                raise ValueError(f"a tensor has {num_dims} dimensions")
            self.skip(8 * num_dims + 4 + 8)  # dimensions, type, offset

    def number(self, layout: str) -> int:
        start = self.at
        self.skip(struct.calcsize(layout))
        return int(struct.unpack_from(layout, self.data, start)[0])

    def skip(self, num_bytes: int) -> None:
        if self.at + num_bytes > len(self.data):
            raise ValueError(f"its header leads to byte {self.at + num_bytes:,} of {len(self.data):,}")
        self.at += num_bytes

    def string(self) -> None:
        self.skip(self.number("<Q"))

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            self.array()
        else:
            self.skip(self.size_bytes(kind))

    def array(self) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        if kind != _STRING:
            self.skip(count * self.size_bytes(kind))
            return
        for _ in range(count):
            self.string()

    @staticmethod
    def size_bytes(kind: int) -> int:
        if kind not in _SIZES_BYTES:
            raise ValueError(f"value type {kind} is not known")
        return _SIZES_BYTES[kind]
