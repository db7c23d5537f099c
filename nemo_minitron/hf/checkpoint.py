"""Reading and writing of Hugging Face checkpoints, tensor by tensor: config.json and safetensors files.

Memory: reading holds one tensor or slice; writing holds one shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import (
    ModelShape,
    explicit_config,
    num_params,
    parameters,
    read_shape,
    tensor_shape,
)
from nemo_minitron.hf.folder_hints import no_config
from nemo_minitron.hf.json_file import read_json_object, write_json
from nemo_minitron.hf.side_files import copy_side_files, side_files
from nemo_minitron.hf.tensor_names import misnamed
from nemo_minitron.hf.weight_files import BUFFERS, INDEX_FILE, SINGLE_FILE, StoredTensor, opened, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "CONFIG_FILE",
    "DTYPES",
    "HEAD",
    "INDEX_FILE",
    "MAX_SHARD_BYTES",
    "SINGLE_FILE",
    "Checkpoint",
    "CheckpointWriter",
    "StoredTensor",
    "copy_side_files",
    "model_facts",
    "read_config",
    "require_tied_head",
    "side_files",
    "write_json",
]

CONFIG_FILE = "config.json"
MAX_SHARD_BYTES = 5 * 10**9
HEAD = "lm_head.weight"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Data types: safetensors' name -> torch's name."""


@dataclass(frozen=True)
class Checkpoint:
    """Opened checkpoint folder. Only the headers are in memory; tensors are read on demand."""

    path: Path
    config: Mapping[str, Any]
    """config.json with all defaults filled in; see `explicit_config`."""
    shape: ModelShape
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder and check, from the headers, that it contains exactly the tensors of its architecture.

        Rotary buffers and a `lm_head.weight` in addition to tied embeddings are accepted (old exports have them).

        Raises:
            CheckpointError: files are missing or damaged, the architecture is unknown, or tensors are missing,
                unexpected, not floating point, or of another shape.
        """
        found, where = read_config(path), str(path / CONFIG_FILE)
        shape = read_shape(found, where=where)
        checkpoint = cls(path, explicit_config(found, where=where), shape, stored_tensors(path))
        _require_names(checkpoint)
        _require_dims_and_dtypes(checkpoint)
        return checkpoint

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """Read one tensor or a slice of it. Only the bytes of the slice are read."""
        with opened(self.tensors[name].file) as file:
            if part is None:
                return file.get_tensor(name)
            return file.get_slice(name)[part]

    def embeddings(self) -> Tensor:
        """Read the input embeddings [vocabulary, hidden size]."""
        return self.read(next(parameters(self.shape)).hf)

    @property
    def files(self) -> tuple[Path, ...]:
        """Sorted paths of the safetensors files."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def dtype(self) -> str:
        """Data type of the first parameter (the embeddings): float32, bfloat16, float16 or float64."""
        return DTYPES[self.tensors[next(parameters(self.shape)).hf].dtype]

    @property
    def dtypes(self) -> set[str]:
        """Data types of all tensors."""
        return {DTYPES.get(tensor.dtype, tensor.dtype) for tensor in self.tensors.values()}

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def _require_names(checkpoint: Checkpoint) -> None:
    expected = {parameter.hf for parameter in parameters(checkpoint.shape)}
    tolerated = {name for name in checkpoint.tensors if name.endswith(BUFFERS)}
    if checkpoint.shape.tied_embeddings:
        tolerated.add(HEAD)
    missing = sorted(expected - checkpoint.tensors.keys())
    extra = sorted(checkpoint.tensors.keys() - expected - tolerated)
    if missing or extra:
        raise CheckpointError(
            f"The tensors do not fit the architecture {checkpoint.config['architectures'][0]}: {len(missing)} missing, "
            f"{len(extra)} unexpected (e.g. {', '.join((missing + extra)[:3])}).",
            where=str(checkpoint.path),
            allowed=f"exactly the {len(expected)} tensors that config.json implies",
            next_step=misnamed(checkpoint.tensors, expected)
            or "Check that the download is complete and that config.json belongs to the same model.",
        )


def _require_dims_and_dtypes(checkpoint: Checkpoint) -> None:
    for parameter in parameters(checkpoint.shape):
        stored, dims = checkpoint.tensors[parameter.hf], tensor_shape(checkpoint.shape, parameter.row)
        if stored.dims != dims:
            raise CheckpointError(
                f"{parameter.hf} has shape {list(stored.dims)}; config.json implies {list(dims)}.",
                where=str(stored.file),
                next_step="Use a config.json of the same model; or transpose the tensor, if the sizes are swapped.",
            )
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{parameter.hf} is stored as {stored.dtype}.",
                where=str(stored.file),
                allowed=", ".join(DTYPES),
                next_step="Use the model's unquantized version.",
            )


def require_tied_head(checkpoint: Checkpoint) -> None:
    """Check that an output head stored in addition to tied embeddings equals them.

    Raises:
        CheckpointError: they differ, so it is ambiguous which of them the model uses.
    """
    stored = checkpoint.tensors.get(HEAD)
    if stored is None or not checkpoint.shape.tied_embeddings:
        return
    embeddings = next(parameters(checkpoint.shape)).hf
    same = stored.dims == checkpoint.tensors[embeddings].dims and all(
        bool((checkpoint.read(HEAD, rows) == checkpoint.read(embeddings, rows)).all())
        for rows in _row_blocks(stored.dims[0])
    )
    if not same:
        raise CheckpointError(
            f"config.json ties the embeddings, but {HEAD} differs from {embeddings}.",
            where=str(stored.file),
            next_step='Set "tie_word_embeddings": false in config.json if the model has an untied head; otherwise '
            f"remove {HEAD}.",
        )


def _row_blocks(num_rows: int) -> Iterator[tuple[slice]]:
    """Yield slices of rows, so that comparing two vocabularies needs little memory."""
    for start in range(0, num_rows, 4096):
        yield (slice(start, min(start + 4096, num_rows)),)


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint folder without changes.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    file = path / CONFIG_FILE
    if not (file.is_file() or file.is_symlink()):
        raise no_config(path)
    return read_json_object(file)


class CheckpointWriter:
    """Writer of tensors into shards in the order of `add`; `close` writes the index and config.json.

    Memory: at most one shard. Tensors that need no conversion are held by reference, so they must not be changed
    between `add` and `close`.

    Args:
        out_dir: existing folder.
        config: written as config.json, with `dtype` set to that of the first tensor.
        dtype: data type to convert the tensors to; None keeps the type of each tensor.
        max_shard_bytes: maximum size of a shard, unless a single tensor is larger.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(
        self,
        out_dir: Path,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.out_dir, self.config, self.dtype, self.max_shard_bytes = out_dir, dict(config), dtype, max_shard_bytes
        self._buffer: dict[str, Tensor] = {}
        self._buffered_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._first_dtype = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor. Each name can be added once."""
        if name in self._buffer or any(name in names for names in self._shards):
            raise AssertionError(f"{name} was added twice")
        tensor = tensor.detach().to(device="cpu", dtype=self.dtype or tensor.dtype).contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._buffer and self._buffered_bytes + size > self.max_shard_bytes:
            self._write_shard()
        self._buffer[name] = tensor
        self._buffered_bytes += size
        self._total_bytes += size
        self._first_dtype = self._first_dtype or str(tensor.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Write the last shard, the index and the config."""
        self._write_shard()
        if len(self._shards) == 1:
            os.replace(self._shard_path(0), self.out_dir / SINGLE_FILE)
        else:
            self._write_index()
        # transformers before 4.56 only reads `torch_dtype`.
        self.config |= {"dtype": self._first_dtype, "torch_dtype": self._first_dtype}
        write_json(self.out_dir / "config.json", self.config)

    def _shard_path(self, number: int) -> Path:
        return self.out_dir / f"shard-{number:05d}.safetensors"

    def _write_shard(self) -> None:
        if self._buffer:
            _save(self._buffer, self._shard_path(len(self._shards)))
            self._shards.append(list(self._buffer))
            self._buffer, self._buffered_bytes = {}, 0

    def _write_index(self) -> None:
        total = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            os.replace(self._shard_path(number), self.out_dir / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self.out_dir / INDEX_FILE, index)


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), str(file), metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors reports operating system errors only as text.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error
    # safetensors creates private files; give them the read and write permissions of the folder.
    file.chmod(file.parent.stat().st_mode & 0o666)


def model_facts(model_dir: Path) -> dict[str, Any]:
    """Check a model folder, and return the facts about it for a manifest.

    Raises:
        CheckpointError: see `Checkpoint.open` and `require_tied_head`.
    """
    checkpoint = Checkpoint.open(model_dir)
    require_tied_head(checkpoint)
    shape = checkpoint.shape
    return {
        "architecture": checkpoint.config["architectures"][0],
        "num_params": num_params(shape),
        "num_params_non_embedding": num_params(shape, embeddings=False),
        "dtype": checkpoint.dtype,
        "checkpoint_bytes": checkpoint.num_bytes,
        "shape": {**shape.sizes(), "vocab_size": shape.vocab_size, "tied_embeddings": shape.tied_embeddings},
    }
