"""Read and write Hugging Face checkpoints tensor by tensor: config.json and safetensors files.

Memory: reading holds one tensor (or the slice asked for); writing holds one shard.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import ModelShape, num_params, parameters, read_shape, tensor_shape
from nemo_minitron.hf.tokenizer_files import repairs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What belongs to a model beside its weights."""
HEAD = "lm_head.weight"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""safetensors' word -> torch's."""
_NOT_PARAMETERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of one tensor."""

    file: Path
    dims: tuple[int, ...]
    dtype: str
    """In safetensors' words: F32, BF16."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder: headers are in memory, tensors are read when asked for."""

    path: Path
    config: Mapping[str, Any]
    shape: ModelShape
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder and check, from the headers, that it holds exactly the tensors of its architecture.

        Rotary buffers, and a `lm_head.weight` beside tied embeddings, may be there too (old exports have them).

        Raises:
            CheckpointError: missing or damaged files, unknown architecture, or tensors that are missing,
                unexpected, of another shape, or not floating point.
        """
        config = read_config(path)
        shape = read_shape(config, where=str(path / "config.json"))
        checkpoint = cls(path, config, shape, _stored_tensors(path))
        _require_names(checkpoint)
        _require_dims_and_dtypes(checkpoint)
        return checkpoint

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor, or a slice of it; only the bytes of the slice are read."""
        with _opened(self.tensors[name].file) as file:
            if part is None:
                return file.get_tensor(name)
            return file.get_slice(name)[part]

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def dtype(self) -> str:
        """Storage type of the first parameter (the embeddings): float32, bfloat16, float16 or float64."""
        return DTYPES[self.tensors[next(parameters(self.shape)).hf].dtype]

    @property
    def dtypes(self) -> set[str]:
        """Storage types of all tensors."""
        return {DTYPES.get(tensor.dtype, tensor.dtype) for tensor in self.tensors.values()}

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def _require_names(checkpoint: Checkpoint) -> None:
    expected = {parameter.hf for parameter in parameters(checkpoint.shape)}
    tolerated = {name for name in checkpoint.tensors if name.endswith(_NOT_PARAMETERS)}
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
            next_step="Is the download complete, and is config.json of the same model?",
        )


def _require_dims_and_dtypes(checkpoint: Checkpoint) -> None:
    for parameter in parameters(checkpoint.shape):
        stored, dims = checkpoint.tensors[parameter.hf], tensor_shape(checkpoint.shape, parameter.row)
        if stored.dims != dims:
            raise CheckpointError(
                f"{parameter.hf} has shape {list(stored.dims)}; config.json asks for {list(dims)}.",
                where=str(stored.file),
                next_step="config.json and the weights are of different models.",
            )
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{parameter.hf} is stored as {stored.dtype}.",
                where=str(stored.file),
                allowed=", ".join(DTYPES),
                next_step="Use the model's unquantized version.",
            )


def require_tied_head(checkpoint: Checkpoint) -> None:
    """A head that is stored beside tied embeddings equals them: otherwise it is not certain which one is meant.

    Raises:
        CheckpointError: the two differ.
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
            next_step='Set "tie_word_embeddings": false in config.json if the model has its own head; else remove it.',
        )


def _row_blocks(num_rows: int) -> Iterator[tuple[slice]]:
    """Slices that keep a comparison of two vocabularies small in memory."""
    for start in range(0, num_rows, 4096):
        yield (slice(start, min(start + 4096, num_rows)),)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            "There is no config.json: not a Hugging Face model folder.",
            where=str(path),
            next_step="Give a folder with config.json and *.safetensors, a .gguf file, hf:ORG/NAME or asset:NAME.",
        )
    return _read_json_object(file)


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    if not isinstance(content, dict):
        raise _damaged(file, "it is not a JSON object")
    return content


def _damaged(file: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is damaged or cut off: {why}",
        where=str(file),
        next_step="Download or copy the file again; compare its size with the source's.",
    )


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, from the headers of its safetensors files."""
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file():
        return _header(single)
    if not index.is_file():
        pickles = " Pickled weights (*.bin) are there, which are not read." if [*path.glob("*.bin")] else ""
        raise CheckpointError(
            f"There is neither {SINGLE_FILE} nor {INDEX_FILE}.{pickles}",
            where=str(path),
            next_step="Convert the weights to safetensors first: load the model with transformers where you trust "
            "its files, and save_pretrained(FOLDER, safe_serialization=True).",
        )
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise _damaged(index, "it has no weight_map")
    shards = {file: _header(_shard(path, str(file))) for file in sorted(set(map(str, weight_map.values())))}
    for name, file in weight_map.items():
        if name not in shards[str(file)]:
            raise _damaged(path / str(file), f"{name} should be in it")
    return {name: shards[str(file)][name] for name, file in weight_map.items()}


def _shard(path: Path, file: str) -> Path:
    shard = path / file
    if Path(file).name != file or not shard.is_file():
        raise CheckpointError(
            f"Shard {file} is missing.", where=str(path), next_step="Complete the download of the model."
        )
    return shard


def _header(file: Path) -> dict[str, StoredTensor]:
    with _opened(file) as opened:
        views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: StoredTensor(file, tuple(v.get_shape()), str(v.get_dtype())) for name, v in views.items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An open safetensors file; what is wrong with it becomes a CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


class CheckpointWriter:
    """Writes tensors into shards as they come; `close` writes the index and config.json.

    Memory: at most one shard is held, by reference where no conversion was needed, so a tensor must not
    be changed between `add` and `close`.

    Args:
        out_dir: must exist.
        config: written as config.json, with `dtype` of the written tensors.
        dtype: tensors are converted to it; None keeps each tensor's own.
        max_shard_bytes: a shard is written when it would grow past this; a larger tensor gets its own.

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
        """Take one tensor; each name once."""
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
        """Write what is left, the index and the config."""
        self._write_shard()
        if len(self._shards) == 1:
            os.replace(self._shard_path(0), self.out_dir / SINGLE_FILE)
        else:
            self._write_index()
        # transformers before 4.56 knows the second name only.
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
        # safetensors reports what the disk refuses as text.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error
    # safetensors makes its files private; let those read it who may read the folder.
    file.chmod(file.parent.stat().st_mode & 0o666)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Indented, with sorted keys."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def side_files(model_dir: Path) -> Iterator[Path]:
    """Tokenizer, chat template, generation config and licence files of a model folder."""
    for pattern in SIDE_FILES:
        yield from sorted(path for path in model_dir.glob(pattern) if path.is_file())


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy everything that belongs to a model beside its weights and config; returns what was repaired, in words.

    Tokenizer files are repaired where versions of transformers would read them differently. Damaged ones are copied as
    they are: whoever loads the tokenizer says what is wrong.
    """
    for file in side_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    try:
        found = repairs(source)
    except CheckpointError:
        return []
    found.write(target)
    return found.notes


def model_facts(model_dir: Path) -> dict[str, Any]:
    """What a manifest says of a model; the folder is checked on the way.

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
