"""Writer of Hugging Face checkpoints: shards of safetensors, their index and config.json.

A safetensors file (https://huggingface.co/docs/safetensors) has the length of the header in 8 bytes, the header in
JSON, and the bytes of the tensors. The `safetensors` package can only write tensors that are all in memory; this writer
can hold one at a time and produces byte-identical files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.hf.json_file import write_json
from nemo_minitron.hf.weight_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Data types: safetensors' name -> torch's name."""
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


class CheckpointWriter:
    """Writer of tensors into shards in the order of `add`; `close` writes the index and config.json.

    Memory: one tensor if all tensors are planned, otherwise one shard, because the header of a file lists its tensors.
    Tensors that need no conversion are held by reference, so they must not be changed between `add` and `close`.

    An interrupted checkpoint is never mistaken for a complete one: the header of each file is written last, and `close`
    gives the files their names and writes config.json.

    Args:
        out_dir: existing folder.
        config: written as config.json, with `dtype` set to that of the first tensor.
        planned: all tensors in the order of `add`; None: they are not known in advance.
        dtype: data type to convert the tensors to; None keeps the type of each tensor.
        max_shard_bytes: maximum size of a shard, unless a single tensor is larger.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(
        self,
        out_dir: Path,
        config: Mapping[str, Any],
        planned: Sequence[Planned] | None = None,
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.out_dir, self.config, self.dtype, self.max_shard_bytes = out_dir, dict(config), dtype, max_shard_bytes
        self._shards = [] if planned is None else list(_fill_shards(planned, max_shard_bytes))
        self._left = (
            None if planned is None else iter([(n, item) for n, part in enumerate(self._shards) for item in part])
        )
        self._file: _ShardFile | None = None
        self._held: list[tuple[Planned, Tensor]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor: the next one of the plan, or one with a new name."""
        tensor = tensor.detach().to(device="cpu", dtype=self.dtype or tensor.dtype).contiguous()
        item = Planned(name, tuple(tensor.shape), _NAMES[str(tensor.dtype).removeprefix("torch.")])
        if self._left is None:
            self._hold(item, tensor)
            return
        number, expected = next(self._left)
        if item != expected:
            raise AssertionError(f"got {item}, expected {expected}")
        if expected is self._shards[number][0]:
            self._file = _ShardFile(self._shard_path(number), self._shards[number])
        assert self._file is not None
        self._file.write(name, tensor)

    def close(self) -> None:
        """Write what is left, name the files, and write the index and the config."""
        self._write_held()
        missing = [item.name for _, item in self._left or ()]
        if missing:
            raise AssertionError(f"not written: {', '.join(missing[:3])}")
        total = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards):
            final = SINGLE_FILE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            os.replace(self._shard_path(number), self.out_dir / final)
            weight_map |= {item.name: final for item in shard}
        if total > 1:
            total_bytes = sum(item.num_bytes for shard in self._shards for item in shard)
            write_json(self.out_dir / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        dtype = DTYPES[self._shards[0][0].dtype]
        # transformers before 4.56 only reads `torch_dtype`.
        write_json(self.out_dir / CONFIG_FILE, {**self.config, "dtype": dtype, "torch_dtype": dtype})

    def _hold(self, item: Planned, tensor: Tensor) -> None:
        held = [other for other, _ in self._held]
        if any(item.name == other.name for shard in (*self._shards, held) for other in shard):
            raise AssertionError(f"{item.name} was added twice")
        if held and sum(other.num_bytes for other in held) + item.num_bytes > self.max_shard_bytes:
            self._write_held()
        self._held.append((item, tensor))

    def _write_held(self) -> None:
        if not self._held:
            return
        shard = [item for item, _ in self._held]
        file = _ShardFile(self._shard_path(len(self._shards)), shard)
        for item, tensor in self._held:
            file.write(item.name, tensor)
        self._shards.append(shard)
        self._held = []

    def _shard_path(self, number: int) -> Path:
        return self.out_dir / f"shard-{number:05d}.safetensors"


_NAMES = {name: dtype for dtype, name in DTYPES.items()}


class _ShardFile:
    """One file of planned tensors, which `write` takes in any order. The header follows the last of them."""

    def __init__(self, path: Path, items: Sequence[Planned]) -> None:
        self._header, self._starts = _layout(items)
        self._num_left = len(items)
        self._file = path.open("wb")

    def write(self, name: str, tensor: Tensor) -> None:
        import torch

        self._file.seek(self._starts[name])
        self._file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        self._num_left -= 1
        if not self._num_left:
            self._file.seek(0)
            self._file.write(self._header)
            self._file.close()


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
