"""Streaming writer for checkpoints whose tensor names, shapes and types are known in advance.

A safetensors file (https://huggingface.co/docs/safetensors) has the length of the header in 8 bytes, the header in
JSON, and the bytes of the tensors. The `safetensors` package can only write tensors that are all in memory; this writer
holds one tensor and produces byte-identical files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nemo_minitron.hf.checkpoint import DTYPES, INDEX_FILE, MAX_SHARD_BYTES, SINGLE_FILE, write_json

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Data type -> bytes per value, in the order in which safetensors stores tensors: wide types first, for alignment."""
_ALIGNMENT = 8


@dataclass(frozen=True)
class Planned:
    """Name, shape and data type (as named by safetensors) of a tensor to write."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return prod(self.dims) * _BYTES[self.dtype]


class StreamWriter:
    """Writer of the planned tensors in their order; `close` writes the index and config.json.

    Memory: one tensor. An interrupted checkpoint is never mistaken for a complete one: config.json is written by
    `close`, and the header of each file is written last.

    Args:
        out_dir: existing folder.
        config: written as config.json, with `dtype` set to that of the first tensor.
        max_shard_bytes: maximum size of a file, unless a single tensor is larger.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(
        self,
        out_dir: Path,
        config: Mapping[str, Any],
        planned: Sequence[Planned],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.out_dir, self.config = out_dir, dict(config)
        self._shards = list(_fill_shards(planned, max_shard_bytes))
        self._left = self._in_order()
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._header, self._starts = b"", dict[str, int]()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next planned tensor."""
        import torch

        number, expected = next(self._left)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if (name, tuple(tensor.shape), dtype) != (expected.name, expected.dims, DTYPES[expected.dtype]):
            raise AssertionError(f"got {name} {list(tensor.shape)} {dtype}, expected {expected}")
        if expected is self._shards[number][0]:
            self._open(number)
        assert self._file is not None
        self._file.seek(self._starts[name])
        self._file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        if expected is self._shards[number][-1]:
            self._file.seek(0)
            self._file.write(self._header)
            self._stack.close()

    def close(self) -> None:
        """Write the index and the config after all planned tensors have been added."""
        missing = [planned.name for _, planned in self._left]
        if missing:
            raise AssertionError(f"not written: {', '.join(missing[:3])}")
        if len(self._shards) > 1:
            weight_map = {planned.name: self._name(n) for n, shard in enumerate(self._shards) for planned in shard}
            total = sum(planned.num_bytes for shard in self._shards for planned in shard)
            write_json(self.out_dir / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        dtype = DTYPES[self._shards[0][0].dtype]
        # transformers before 4.56 only reads `torch_dtype`.
        write_json(self.out_dir / "config.json", {**self.config, "dtype": dtype, "torch_dtype": dtype})

    def _in_order(self) -> Iterator[tuple[int, Planned]]:
        for number, shard in enumerate(self._shards):
            for planned in shard:
                yield number, planned

    def _open(self, number: int) -> None:
        path = self.out_dir / self._name(number)
        self._file = self._stack.enter_context(path.open("wb"))
        self._header, self._starts = _layout(self._shards[number])

    def _name(self, number: int) -> str:
        total = len(self._shards)
        return SINGLE_FILE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _fill_shards(planned: Sequence[Planned], max_shard_bytes: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for tensor in planned:
        if shard and sum(other.num_bytes for other in shard) + tensor.num_bytes > max_shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _layout(shard: Sequence[Planned]) -> tuple[bytes, dict[str, int]]:
    """Return the header bytes of a file, and name -> byte offset in the file of each tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, stop = {}, 0
    for planned in sorted(shard, key=lambda planned: ([*_BYTES].index(planned.dtype), planned.name)):
        starts[planned.name], stop = stop, stop + planned.num_bytes
        offsets = [starts[planned.name], stop]
        entries[planned.name] = {"dtype": planned.dtype, "shape": list(planned.dims), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
