"""Reading of Hugging Face checkpoints, tensor by tensor: config.json and safetensors files.

Memory: one tensor or slice. `checkpoint_writer.py` writes checkpoints.
"""

from __future__ import annotations

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
from nemo_minitron.hf.checkpoint_writer import DTYPES, MAX_SHARD_BYTES, CheckpointWriter
from nemo_minitron.hf.folder_hints import no_config
from nemo_minitron.hf.json_file import read_json_object, write_json
from nemo_minitron.hf.side_files import copy_side_files, side_files
from nemo_minitron.hf.tensor_names import misnamed
from nemo_minitron.hf.weight_files import (
    BUFFERS,
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    opened,
    stored_tensors,
)

if TYPE_CHECKING:
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

HEAD = "lm_head.weight"


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
