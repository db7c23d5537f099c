"""Streaming writer for checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nemo_minitron.hf.checkpoint import CheckpointWriter
from nemo_minitron.hf.stream_writer import Planned, StreamWriter

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bias": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "c": torch.full((4, 4), 7.0, dtype=torch.float64),
}
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}
PLANNED = [Planned(name, tuple(tensor.shape), WORDS[tensor.dtype]) for name, tensor in TENSORS.items()]


def _write(folder: Path, **options: Any) -> None:
    writer = StreamWriter(folder, {"model_type": "x"}, PLANNED, **options)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.close()


def test_safetensors_reads_the_written_files(tmp_path: Path) -> None:
    _write(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "x", "dtype": "float32", "torch_dtype": "float32"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_shards_respect_the_size_limit_and_the_index_lists_every_tensor(tmp_path: Path) -> None:
    _write(tmp_path, max_shard_bytes=30)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {"a": first, "b.bias": first, "c": second}
    assert index["metadata"]["total_size"] == 24 + 4 + 128
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


@pytest.mark.parametrize("max_shard_bytes", [1, 30, 10**9])
def test_the_files_equal_those_of_safetensors_byte_for_byte(tmp_path: Path, max_shard_bytes: int) -> None:
    """Plan narrow types first, because safetensors stores wide types first."""
    order = ["b.bias", "c", "a", "d"]
    tensors = {**TENSORS, "d": torch.ones(3, dtype=torch.float16)}
    planned = [Planned(n, tuple(tensors[n].shape), {**WORDS, torch.float16: "F16"}[tensors[n].dtype]) for n in order]
    for folder in ("streamed", "whole"):
        (tmp_path / folder).mkdir()
    streamed = StreamWriter(tmp_path / "streamed", {}, planned, max_shard_bytes=max_shard_bytes)
    whole = CheckpointWriter(tmp_path / "whole", {}, max_shard_bytes=max_shard_bytes)
    for writer in (streamed, whole):
        for name in order:
            writer.add(name, tensors[name])
        writer.close()
    found, expected = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("streamed", "whole")
    )
    assert found == expected


def test_an_incomplete_file_cannot_be_read(tmp_path: Path) -> None:
    """This also holds if the tensor at the end of the file was written first."""
    writer = StreamWriter(tmp_path, {}, [Planned("z", (2,), "F32"), Planned("a", (2,), "F32")])
    writer.add("z", torch.ones(2))
    assert writer._file is not None
    writer._file.flush()
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")
    writer.add("a", torch.ones(2))
    assert load_file(tmp_path / "model.safetensors").keys() == {"a", "z"}


def test_a_slice_of_a_larger_tensor_is_written_correctly(tmp_path: Path) -> None:
    whole = torch.arange(20.0).reshape(4, 5)
    writer = StreamWriter(tmp_path, {}, [Planned("x", (4, 2), "F32")])
    writer.add("x", whole[:, 1:3])
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], whole[:, 1:3])


def test_an_unplanned_tensor_is_a_bug_and_an_unfinished_folder_has_no_config(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path, {}, PLANNED)
    with pytest.raises(AssertionError, match="expected"):
        writer.add("a", TENSORS["a"].T)
    writer = StreamWriter(tmp_path, {}, PLANNED)
    writer.add("a", TENSORS["a"])
    with pytest.raises(AssertionError, match=r"not written: b.bias, c"):
        writer.close()
    assert not (tmp_path / "config.json").exists()


def test_a_full_disk_is_an_os_error() -> None:
    writer = StreamWriter(Path("/dev"), {}, [Planned("x", (2**20,), "F32")])
    writer._name = lambda number: "full"  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        writer.add("x", torch.zeros(2**20))
