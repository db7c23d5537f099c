"""Bounds-checked parsing of a GGUF file's header.

The gguf package trusts every count in the header: a wrong count in a damaged file can keep it busy for hours.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.file_content import require_content
from nemo_minitron.limits import GGUF_VALUES

_MAGIC = b"GGUF"
_BEFORE_GGUF = (b"lmgg", b"fmgg", b"tjgg", b"algg")
"""First bytes of the llama.cpp formats before GGUF: GGML, GGMF, GGJT and GGLA."""
_VERSIONS = (2, 3)
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_SIZES_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type -> size in bytes, for types of fixed size."""
_MAX_DIMS = 4
_MAX_KEYS, _MAX_TENSORS = 10_000, 200_000
"""Limits of the header. A typical model has 40 keys and 12 tensors per layer."""
_ALIGNMENT_KEY, _ALIGNMENT = b"general.alignment", 32
_CONVERT_AGAIN = "Convert the model again with a current llama.cpp, or import it from its Hugging Face folder."


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor."""

    name: str
    num_values: int
    kind: int
    """GGML type number."""
    start: int
    """Byte offset of the data in the file."""


def scan_header(file: Path) -> list[TensorInfo]:
    """Parse the header, and return the entries of the tensors.

    Raises:
        ValueError: a count or length points past the end of the file, or a value is invalid.
        CheckpointError: the file has another format or version.
    """
    require_content(file, may_be_empty=True)
    if file.stat().st_size == 0:
        raise ValueError("the file is empty")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _require_version(data[:8], file)
        return _Parser(data).tensors()


def _require_version(start: bytes, file: Path) -> None:
    if start[:4] in _BEFORE_GGUF:
        raise _other_version("The file has a llama.cpp format from before GGUF.", file)
    if start[:4] != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    if len(start) < 8:
        raise ValueError("it ends after its first bytes")
    little, big = struct.unpack("<I", start[4:])[0], struct.unpack(">I", start[4:])[0]
    if little not in _VERSIONS and big in _VERSIONS:
        raise CheckpointError(
            "The GGUF file is big-endian.",
            where=str(file),
            allowed="little-endian files",
            next_step=f"python -m gguf.scripts.gguf_convert_endian {file.name} little (it changes the file in place)",
        )
    if little == 1 or _VERSIONS[-1] < little < 100:
        raise _other_version(f"The GGUF file has version {little}.", file)
    if little not in _VERSIONS:
        raise ValueError(f"version {little} is not 2 or 3")


def _other_version(what: str, file: Path) -> CheckpointError:
    return CheckpointError(what, where=str(file), allowed="GGUF versions 2 and 3", next_step=_CONVERT_AGAIN)


class _Parser:
    """Parser of a header; every read advances the position `at`, in bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.alignment, self.elements = data, 8, _ALIGNMENT, 0

    def tensors(self) -> list[TensorInfo]:
        num_tensors, num_values = self.number("<Q"), self.number("<Q")
        if num_values > _MAX_KEYS or num_tensors > _MAX_TENSORS:
            raise ValueError(
                f"it has {num_values:,} keys and {num_tensors:,} tensors; "
                f"at most {_MAX_KEYS:,} and {_MAX_TENSORS:,} are read"
            )
        for _ in range(num_values):
            self.key_and_value()
        found = [self.tensor() for _ in range(num_tensors)]
        start = -(-self.at // self.alignment) * self.alignment
        return [TensorInfo(info.name, info.num_values, info.kind, start + info.start) for info in found]

    def key_and_value(self) -> None:
        key, kind = self.string(), self.number("<I")
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            self.alignment = self.number("<I")
            if self.alignment == 0 or self.alignment & (self.alignment - 1):
                raise ValueError(f"general.alignment = {self.alignment} is not a power of two")
            return
        self.value(kind)

    def tensor(self) -> TensorInfo:
        """Parse the entry of a tensor. Its `start` is relative to the beginning of the data section."""
        name, num_dims = self.string(), self.number("<I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"a tensor has {num_dims} dimensions")
        dims = [self.number("<Q") for _ in range(num_dims)]
        return TensorInfo(name.decode("utf-8", "replace"), prod(dims), self.number("<I"), self.number("<Q"))

    def number(self, layout: str) -> int:
        start = self.at
        self.skip(struct.calcsize(layout))
        return int(struct.unpack_from(layout, self.data, start)[0])

    def skip(self, num_bytes: int) -> None:
        if self.at + num_bytes > len(self.data):
            raise ValueError(f"its header points to byte {self.at + num_bytes:,} of {len(self.data):,}")
        self.at += num_bytes

    def string(self) -> bytes:
        length = self.number("<Q")
        self.skip(length)
        return self.data[self.at - length : self.at]

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            self.array()
        else:
            self.skip(self.size_bytes(kind))

    def array(self) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        self.elements += count
        if self.elements > GGUF_VALUES.value():
            # The gguf package creates several objects per element.
            raise ValueError(f"its arrays hold more than {GGUF_VALUES.value():,} values. {GGUF_VALUES.how_to_raise()}")
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
