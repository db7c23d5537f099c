"""The writer of checkpoints: with a plan it streams one tensor at a time, without one it holds a shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_minitron.hf.checkpoint_writer import CheckpointWriter, Planned

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bias": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "c": torch.full((4, 4), 7.0, dtype=torch.float64),
}
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.float16: "F16"}
PLANNED = [Planned(name, tuple(tensor.shape), WORDS[tensor.dtype]) for name, tensor in TENSORS.items()]
MIXED = {"b.bias": TENSORS["b.bias"], "c": TENSORS["c"], "a": TENSORS["a"], "d": torch.ones(3, dtype=torch.float16)}
MIXED_PLAN = [Planned(name, tuple(tensor.shape), WORDS[tensor.dtype]) for name, tensor in MIXED.items()]


def _write(folder: Path, **options: Any) -> None:
    writer = CheckpointWriter(folder, {"model_type": "x"}, PLANNED, **options)
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
def test_files_with_and_without_a_plan_are_the_same(tmp_path: Path, max_shard_bytes: int) -> None:
    for folder, planned in (("streamed", MIXED_PLAN), ("held", None)):
        _write_mixed(tmp_path / folder, planned, max_shard_bytes)
    found, expected = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("streamed", "held")
    )
    assert found == expected


@pytest.mark.parametrize("planned", [True, False])
def test_the_file_equals_that_of_safetensors_byte_for_byte(tmp_path: Path, planned: bool) -> None:
    """Narrow types are added first, because safetensors stores wide types first."""
    _write_mixed(tmp_path / "ours", MIXED_PLAN if planned else None, 10**9)
    save_file(MIXED, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def _write_mixed(folder: Path, planned: list[Planned] | None, max_shard_bytes: int) -> None:
    folder.mkdir()
    writer = CheckpointWriter(folder, {}, planned, max_shard_bytes=max_shard_bytes)
    for name, tensor in MIXED.items():
        writer.add(name, tensor)
    writer.close()


def test_an_incomplete_file_cannot_be_read(tmp_path: Path) -> None:
    """This also holds if the tensor at the end of the file was written first."""
    writer = CheckpointWriter(tmp_path, {}, [Planned("z", (2,), "F32"), Planned("a", (2,), "F32")])
    writer.add("z", torch.ones(2))
    assert writer._file is not None
    writer._file._file.flush()
    (unfinished,) = tmp_path.iterdir()
    with pytest.raises(SafetensorError):
        load_file(unfinished)
    writer.add("a", torch.ones(2))
    assert load_file(unfinished).keys() == {"a", "z"}


def test_a_slice_of_a_larger_tensor_is_written_correctly(tmp_path: Path) -> None:
    whole = torch.arange(20.0).reshape(4, 5)
    writer = CheckpointWriter(tmp_path, {}, [Planned("x", (4, 2), "F32")])
    writer.add("x", whole[:, 1:3])
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], whole[:, 1:3])


def test_an_unplanned_tensor_is_a_bug_and_an_unfinished_folder_has_no_config(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {}, PLANNED)
    with pytest.raises(AssertionError, match="expected"):
        writer.add("a", TENSORS["a"].T)
    writer = CheckpointWriter(tmp_path, {}, PLANNED)
    writer.add("a", TENSORS["a"])
    with pytest.raises(AssertionError, match=r"not written: b.bias, c"):
        writer.close()
    assert not (tmp_path / "config.json").exists()


def test_a_full_disk_is_an_os_error() -> None:
    writer = CheckpointWriter(Path("/dev"), {}, [Planned("x", (2**20,), "F32")])
    writer._shard_path = lambda number: Path("/dev/full")  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        writer.add("x", torch.zeros(2**20))
