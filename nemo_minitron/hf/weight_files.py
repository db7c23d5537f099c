"""Safetensors files of a model folder and their headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.file_content import damaged, require_content
from nemo_minitron.hf.folder_hints import no_weights
from nemo_minitron.hf.json_file import read_json_object
from nemo_minitron.hf.links import require_inside
from nemo_minitron.limits import INDEX_BYTES, SAFETENSORS_HEADER_BYTES

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BUFFERS = ("rotary_emb.inv_freq",)
"""Suffixes of buffers that old exports contain and no model needs."""


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor in a safetensors file."""

    file: Path
    dims: tuple[int, ...]
    dtype: str
    """Data type as named by safetensors: F32, BF16."""


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the headers of the safetensors files, and return name -> header entry of every tensor.

    Raises:
        CheckpointError: the files are missing or damaged, or the index does not match them.
    """
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_symlink() or single.is_file():
        require_content(single)
        require_inside(single, path)
        _refuse_second_weights(path)
        return _header(single)
    if not (index.is_symlink() or index.is_file()):
        raise no_weights(path)
    require_content(index)
    require_inside(index, path)
    weight_map = _weight_map(index)
    shards = {file: _header(_shard(path, file)) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise damaged(path / file, f"it does not contain {name}, which {INDEX_FILE} lists in it")
    _refuse_unlisted(path, weight_map, shards)
    return {name: shards[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise damaged(index, "it has no weight_map")
    return {name: str(file) for name, file in weight_map.items()}


def _shard(path: Path, file: str) -> Path:
    shard = path / file
    if Path(file).name != file:
        raise CheckpointError(
            f"Shard {file} of {INDEX_FILE} is missing: only files in the model folder itself are read.",
            where=str(path),
            next_step="Put the shards in the folder of the index, and use names without folders in its weight_map.",
        )
    if not _is_there(shard):
        raise CheckpointError(
            f"Shard {file} is missing.", where=str(path), next_step="Complete the download of the model."
        )
    require_content(shard)
    require_inside(shard, path)
    return shard


def _is_there(file: Path) -> bool:
    """Return whether the path is an existing file or a link; False for invalid file names."""
    try:
        return file.is_file() or file.is_symlink()
    except (OSError, ValueError):
        return False


def _refuse_second_weights(path: Path) -> None:
    """Refuse shards of an index or an adapter in addition to model.safetensors, because the choice is ambiguous."""
    index = path / INDEX_FILE
    others: list[str] = []
    if index.is_file():
        named = set(_weight_map(index).values()) - {SINGLE_FILE}
        others = sorted(file for file in named if _is_there(path / file))
    if (path / "adapter_config.json").is_file():
        others += sorted(file.name for file in path.glob("adapter_model.*"))
    if others:
        raise CheckpointError(
            f"There is {SINGLE_FILE}, and also {', '.join(others[:3])}: it is ambiguous which weights to use.",
            where=str(path),
            next_step="Move the files that should not be used to another folder. Merge an adapter with its model "
            "first.",
        )


def _refuse_unlisted(path: Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse tensors that the index does not list, or lists in another shard, because they would be ignored."""
    for file, header in shards.items():
        for name in sorted(header):
            if weight_map.get(name) != file and not name.endswith(BUFFERS):
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise CheckpointError(
                    f"{file} contains {name}; {INDEX_FILE} {listed}.",
                    where=str(path),
                    next_step="Download the index and the shards again: they are from different versions.",
                )


def _require_short_header(file: Path) -> None:
    """Limit the header length, which is stored in the first eight bytes: the whole header is read into memory."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if SAFETENSORS_HEADER_BYTES.value() < length <= file.stat().st_size:
        raise damaged(file, f"its header has {length:,} bytes. {SAFETENSORS_HEADER_BYTES.how_to_raise()}")


def _header(file: Path) -> dict[str, StoredTensor]:
    with opened(file) as stream:
        views = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
        return {name: StoredTensor(file, tuple(v.get_shape()), str(v.get_dtype())) for name, v in views.items()}


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file, and convert errors to CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        _require_short_header(file)
        with safe_open(str(file), framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error
