"""Reading, validation and writing of Hugging Face model folders."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import parameters
from nemo_minitron.hf.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    CheckpointWriter,
    copy_side_files,
    model_facts,
)
from tests.support.tiny_models import load_transformers, tiny_model_dir


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models"), "llama_mha")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models"), "llama_gqa_tied")


@pytest.fixture
def copied(untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "copy"))


def _sharded(source: Path, out_dir: Path, max_shard_bytes: int = 100_000) -> Path:
    out_dir.mkdir()
    checkpoint = Checkpoint.open(source)
    writer = CheckpointWriter(out_dir, checkpoint.config, max_shard_bytes=max_shard_bytes)
    for parameter in parameters(checkpoint.shape):
        writer.add(parameter.hf, checkpoint.read(parameter.hf))
    writer.close()
    return out_dir


def test_a_slice_equals_the_part_of_the_whole_tensor(untied: Path) -> None:
    checkpoint = Checkpoint.open(untied)
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = load_file(untied / SINGLE_FILE)[name]
    assert torch.equal(checkpoint.read(name), whole)
    assert torch.equal(checkpoint.read(name, (slice(16, 32), slice(None))), whole[16:32])
    assert torch.equal(checkpoint.read(name, (slice(None), slice(8, 24))), whole[:, 8:24])


def test_written_shards_stay_below_the_limit_and_load_in_transformers(untied: Path, tmp_path: Path) -> None:
    folder = _sharded(untied, tmp_path / "sharded", max_shard_bytes=150_000)
    index = json.loads((folder / INDEX_FILE).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert all(name.endswith(f"-of-{len(names):05d}.safetensors") for name in names)
    for name in names:
        assert sum(t.numel() * 4 for t in load_file(folder / name).values()) <= 150_000
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in load_file(untied / SINGLE_FILE).values())
    original, loaded = load_transformers(untied).state_dict(), load_transformers(folder).state_dict()
    assert all(torch.equal(original[name], loaded[name]) for name in original)


def test_a_sharded_and_a_single_folder_read_alike(untied: Path, tmp_path: Path) -> None:
    one, many = Checkpoint.open(untied), Checkpoint.open(_sharded(untied, tmp_path / "sharded"))
    assert len(many.files) > len(one.files) == 1
    for parameter in parameters(one.shape):
        assert torch.equal(one.read(parameter.hf), many.read(parameter.hf))


def test_a_tensor_larger_than_a_shard_gets_its_own(untied: Path, tmp_path: Path) -> None:
    folder = _sharded(untied, tmp_path / "sharded", max_shard_bytes=1)
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.files) == len(list(parameters(checkpoint.shape)))


def test_the_writer_converts_and_records_the_dtype(untied: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(untied)
    writer = CheckpointWriter(tmp_path, checkpoint.config, dtype=torch.bfloat16)
    for parameter in parameters(checkpoint.shape):
        writer.add(parameter.hf, checkpoint.read(parameter.hf))
    writer.close()
    written = Checkpoint.open(tmp_path)
    assert written.dtype == written.config["dtype"] == written.config["torch_dtype"] == "bfloat16"
    name = "lm_head.weight"
    assert torch.equal(written.read(name), checkpoint.read(name).to(torch.bfloat16))


def test_the_writer_holds_at_most_one_shard(untied: Path, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {}, max_shard_bytes=1000)
    for number in range(20):
        writer.add(str(number), torch.zeros(100))
        assert sum(t.numel() * 4 for _, t in writer._held) <= 1000


def test_adding_a_name_twice_is_a_bug(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {}, max_shard_bytes=1)
    writer.add("a", torch.zeros(2))
    writer.add("b", torch.zeros(2))
    with pytest.raises(AssertionError, match="a was added twice"):
        writer.add("a", torch.zeros(2))


def test_a_full_disk_raises_the_os_error() -> None:
    writer = CheckpointWriter(Path("/dev"), {})
    writer._shard_path = lambda number: Path("/dev/full")  # type: ignore[method-assign]
    writer.add("a", torch.zeros(2**20))
    with pytest.raises(OSError, match="No space left") as caught:
        writer.close()
    assert caught.value.errno == errno.ENOSPC


def test_a_folder_without_write_permission_is_reported_with_its_errno(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "missing", {})
    writer.add("a", torch.zeros(2))
    with pytest.raises(OSError, match="missing") as caught:
        writer.close()
    assert caught.value.errno == errno.ENOENT


def test_written_weights_have_the_permissions_of_the_folder(untied: Path, tmp_path: Path) -> None:
    folder = _sharded(untied, tmp_path / "sharded")
    folder_mode = folder.stat().st_mode
    assert all(file.stat().st_mode & 0o666 == folder_mode & 0o666 for file in folder.glob("*.safetensors"))


def test_side_files_are_copied_and_weights_are_not(untied: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(untied, tmp_path / "source"))
    (source / "LICENSE.txt").write_text("free")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "target").mkdir()
    copy_side_files(source, tmp_path / "target")
    names = {file.name for file in (tmp_path / "target").iterdir()}
    expected = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == expected | {"generation_config.json", "LICENSE.txt"}


def test_model_facts_contain_parameter_and_byte_counts(tied: Path) -> None:
    facts = model_facts(tied)
    assert facts["num_params"] == sum(p.numel() for p in load_transformers(tied).parameters())
    assert facts["num_params_non_embedding"] == facts["num_params"] - 512 * 64
    assert facts["checkpoint_bytes"] == (tied / SINGLE_FILE).stat().st_size
    assert (facts["architecture"], facts["dtype"]) == ("LlamaForCausalLM", "float32")
    json.dumps(facts)


def test_rotary_buffers_of_old_exports_are_accepted(copied: Path) -> None:
    _edit_weights(copied, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    Checkpoint.open(copied)


def test_a_stored_head_with_tied_embeddings_must_equal_them(tied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tied, tmp_path / "copy"))
    _edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model_facts(folder)
    _edit_weights(folder, lambda t: t["lm_head.weight"][511, 63].add_(1.0))
    with pytest.raises(CheckpointError, match=r"ties the embeddings, but lm_head.weight differs"):
        model_facts(folder)


def _edit_weights(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _truncate(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def _pickle_only(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")


def _garbage_header(folder: Path) -> None:
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", 10) + b"not a json")


def _shards_with(folder: Path, edit: Callable[[Path, dict[str, Any]], object]) -> None:
    sharded = _sharded(folder, folder / "sharded")
    (folder / SINGLE_FILE).unlink()
    for file in sharded.iterdir():
        file.rename(folder / file.name)
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(folder, index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "There is no config.json"),
    "config cut off": (lambda f: _truncate(f / "config.json", 0.5), "config.json is damaged or cut off"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "weights cut off in the data": (lambda f: _truncate(f / SINGLE_FILE, 0.7), "model.safetensors is damaged or cut"),
    "weights cut off in the header": (lambda f: _truncate(f / SINGLE_FILE, 1e-4), "model.safetensors is damaged"),
    "weights empty": (lambda f: (f / SINGLE_FILE).write_bytes(b""), "model.safetensors is damaged"),
    "weights garbage": (_garbage_header, "model.safetensors is damaged"),
    "no weights": (lambda f: (f / SINGLE_FILE).unlink(), "There is neither model.safetensors nor"),
    "only pickles": (_pickle_only, "pickled weights"),
    "tensor missing": (lambda f: _edit_weights(f, lambda t: t.pop("model.norm.weight")), "1 missing, 0 unexpected"),
    "tensor unexpected": (
        lambda f: _edit_weights(f, lambda t: t.update({"model.layers.0.mlp.gate_proj.bias": torch.ones(112)})),
        "0 missing, 1 unexpected",
    ),
    "tensor of another shape": (
        lambda f: _edit_config(f, intermediate_size=96),
        r"has shape \[112, 64\]; config.json implies \[96, 64\]",
    ),
    "tensor of whole numbers": (
        lambda f: _edit_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
        "model.norm.weight is stored as I8",
    ),
    "index cut off": (
        lambda f: (_shards_with(f, lambda *_: None), _truncate(f / INDEX_FILE, 0.5)),
        f"{INDEX_FILE} is damaged",
    ),
    "index without map": (lambda f: _shards_with(f, lambda _, i: i.pop("weight_map")), "it has no weight_map"),
    "shard missing": (
        lambda f: _shards_with(f, lambda f, i: (f / next(iter(i["weight_map"].values()))).unlink()),
        "is missing",
    ),
    "shard outside the folder": (
        lambda f: _shards_with(f, lambda _, i: i["weight_map"].update({"lm_head.weight": "../other.safetensors"})),
        "is missing",
    ),
    "shard without its tensor": (
        lambda f: _shards_with(
            f, lambda _, i: i["weight_map"].update({"lm_head.weight": i["weight_map"]["model.embed_tokens.weight"]})
        ),
        "it does not contain lm_head.weight",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_the_error_for_a_bad_folder_names_problem_and_file(copied: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(copied)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(copied)
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(copied))
    assert caught.value.next_step
