"""Read and write Hugging Face checkpoints tensor by tensor: config.json and safetensors files.

Memory: reading holds one tensor (or the slice asked for); writing holds one shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import ModelShape, num_params, parameters, read_shape, tensor_shape

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
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What belongs to a model beside its weights."""
_NOT_PARAMETERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder; tensors are read when asked for."""

    path: Path
    config: Mapping[str, Any]
    shape: ModelShape
    files: Mapping[str, Path]
    """Tensor name -> safetensors file."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder and check that it holds exactly the tensors of its architecture.

        Raises:
            CheckpointError: missing or damaged files, unknown architecture, missing, extra or misshapen tensors.
        """
        config = read_config(path)
        shape = read_shape(config, where=str(path / "config.json"))
        checkpoint = cls(path, config, shape, _tensor_files(path))
        checkpoint._require_complete()
        return checkpoint

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor, or a slice of it; only the bytes of the slice are read."""
        with _open(self.files[name]) as file:
            if part is None:
                return file.get_tensor(name)  # type: ignore[no-any-return]
            return file.get_slice(name)[part]  # type: ignore[no-any-return]

    def dims(self, name: str) -> tuple[int, ...]:
        with _open(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    @property
    def dtype(self) -> str:
        """Storage type of the first parameter, in safetensors' words: F32, BF16."""
        name = next(parameters(self.shape)).hf
        with _open(self.files[name]) as file:
            return str(file.get_slice(name).get_dtype())

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in set(self.files.values()))

    def _require_complete(self) -> None:
        expected = {parameter.hf: tensor_shape(self.shape, parameter.row) for parameter in parameters(self.shape)}
        missing = sorted(expected.keys() - self.files.keys())
        extra = sorted(name for name in self.files.keys() - expected.keys() if not self._tolerated(name))
        if missing or extra:
            raise CheckpointError(
                f"The tensors do not fit the architecture: {len(missing)} missing, {len(extra)} unexpected "
                f"(e.g. {', '.join((missing + extra)[:3])}).",
                where=str(self.path),
                next_step="Is the download complete, and is config.json of the same model?",
            )
        for name, dims in expected.items():
            if self.dims(name) != dims:
                raise CheckpointError(
                    f"{name} has shape {list(self.dims(name))}; config.json asks for {list(dims)}.",
                    where=str(self.files[name]),
                    next_step="config.json and the weights are of different models.",
                )

    def _tolerated(self, name: str) -> bool:
        # Old exports keep rotary buffers, and write a tied head twice.
        return name.endswith(_NOT_PARAMETERS) or (name == "lm_head.weight" and self.shape.tied_embeddings)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "There is no config.json: not a Hugging Face model folder.",
            where=str(path),
            next_step="Give a folder with config.json and *.safetensors, a .gguf file, hf:ORG/NAME or asset:NAME.",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"config.json is not valid JSON: {error}", where=str(file)) from error
    return dict(config)


def _tensor_files(path: Path) -> dict[str, Path]:
    index = path / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(f"The index of the shards is damaged: {error}", where=str(index)) from error
        return {name: _shard(path, file) for name, file in weight_map.items()}
    single = path / SINGLE_FILE
    if not single.is_file():
        raise CheckpointError(
            f"There is neither {SINGLE_FILE} nor {INDEX_FILE}.",
            where=str(path),
            next_step="Pickled weights (pytorch_model.bin) are not read: convert them to safetensors first.",
        )
    with _open(single) as file:
        return {name: single for name in file.keys()}  # noqa: SIM118


def _shard(path: Path, file: str) -> Path:
    shard = path / file
    if Path(file).name != file or not shard.is_file():
        raise CheckpointError(
            f"Shard {file} is missing.", where=str(path), next_step="Complete the download of the model."
        )
    return shard


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file.name} is damaged or cut off ({error}).",
            where=str(file),
            next_step="Download or copy the file again; compare its size with the source's.",
        ) from error


class CheckpointWriter:
    """Writes tensors into shards as they come; `close` writes the index and config.json.

    Args:
        out_dir: must exist.
        config: written as config.json, with `dtype` of the written tensors.
        dtype: tensors are converted to it; None keeps each tensor's own.
        max_shard_bytes: a shard is written when it would grow past this.
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
        self._written_dtype = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        tensor = tensor.detach().to(device="cpu", dtype=self.dtype or tensor.dtype).contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._buffer and self._buffered_bytes + size > self.max_shard_bytes:
            self._write_shard()
        self._buffer[name] = tensor
        self._buffered_bytes += size
        self._total_bytes += size
        self._written_dtype = str(tensor.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Write what is left, the index and the config."""
        self._write_shard()
        if len(self._shards) == 1:
            os.replace(self._shard_path(0), self.out_dir / SINGLE_FILE)
        else:
            self._write_index()
        self.config.pop("torch_dtype", None)
        self.config["dtype"] = self._written_dtype
        (self.out_dir / "config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")

    def _shard_path(self, number: int) -> Path:
        return self.out_dir / f"shard-{number:05d}.safetensors"

    def _write_shard(self) -> None:
        from safetensors.torch import save_file

        if not self._buffer:
            return
        save_file(self._buffer, str(self._shard_path(len(self._shards))), metadata={"format": "pt"})
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
        (self.out_dir / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def side_files(model_dir: Path) -> Iterator[Path]:
    """Tokenizer, chat template, generation config and licence files of a model folder."""
    for pattern in SIDE_FILES:
        yield from sorted(path for path in model_dir.glob(pattern) if path.is_file())


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything that belongs to a model beside its weights and config."""
    for file in side_files(source):
        shutil.copyfile(file, target / file.name)


def model_facts(model_dir: Path) -> dict[str, Any]:
    """What a manifest says of a model."""
    checkpoint = Checkpoint.open(model_dir)
    shape = checkpoint.shape
    return {
        "architecture": checkpoint.config["architectures"][0],
        "num_params": num_params(shape),
        "num_params_non_embedding": num_params(shape, embeddings=False),
        "dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}.get(
            checkpoint.dtype, checkpoint.dtype
        ),
        "checkpoint_bytes": checkpoint.num_bytes,
        "shape": {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_query_groups": shape.num_query_groups,
            "kv_channels": shape.kv_channels,
            "vocab_size": shape.vocab_size,
            "tied_embeddings": shape.tied_embeddings,
        },
    }
