"""Variants of model folders: other names, links, Git LFS pointers, indexes, adapters, prefixes of wrappers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import parameters
from nemo_minitron.hf.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointWriter, read_config
from nemo_minitron.hf.side_files import copy_side_files
from tests.support.tiny_models import tiny_model_dir

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models"), "llama_mha")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "folder"))


def _rename(folder: Path, name: str) -> None:
    (folder / SINGLE_FILE).rename(folder / name)


def _edit_weights(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    edited = edit(tensors)
    save_file(edited if isinstance(edited, dict) else tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def _prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda folder: _edit_weights(folder, lambda t: {f"{prefix}{name}": tensor for name, tensor in t.items()})


def _stripped(folder: Path) -> None:
    _edit_weights(folder, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})


def _shard(folder: Path, edit: Callable[[dict[str, str]], object] = lambda _: None) -> dict[str, str]:
    checkpoint = Checkpoint.open(folder)
    writer = CheckpointWriter(folder, checkpoint.config, max_shard_bytes=150_000)
    for parameter in parameters(checkpoint.shape):
        writer.add(parameter.hf, checkpoint.read(parameter.hf).clone())
    writer.close()
    (folder / SINGLE_FILE).unlink()
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return dict(index["weight_map"])


def _with_both(folder: Path) -> None:
    shutil.copyfile(folder / SINGLE_FILE, folder / "kept")
    _shard(folder)
    (folder / "kept").rename(folder / SINGLE_FILE)


def _adapter(folder: Path, base: str | None = None) -> None:
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base} if base else {}))


def _only_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    _adapter(folder, "someone/base")


def _broken_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/0123")


def _inside(folder: Path) -> None:
    (folder / "snapshots" / "0123").mkdir(parents=True)
    (folder / "config.json").rename(folder / "snapshots" / "0123" / "config.json")


def _twice_in_json(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"hidden_size": 32,' + text.lstrip()[1:])


CASES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "adapter and no model": (
        lambda f: (_adapter(f), (f / SINGLE_FILE).unlink()), "an adapter (LoRA), adapter_model", "merge_and_unload"
    ),
    "adapter and nothing else": (_only_adapter, "an adapter (LoRA) of someone/base", "merge_and_unload"),
    "adapter beside its model": (_adapter, "also adapter_model.safetensors", "Merge an adapter"),
    "another name": (
        lambda f: _rename(f, "pytorch_model.safetensors"), "There is pytorch_model.safetensors", "Rename pytorch_model"
    ),
    "capitals": (lambda f: _rename(f, "Model.SafeTensors"), "There is Model.SafeTensors", "Rename it to model.safe"),
    "config in capitals": (
        lambda f: (f / "config.json").rename(f / "Config.json"), "There is Config.json", "Rename it to config.json"
    ),
    "authors' names": (
        lambda f: _rename(f, "consolidated.safetensors"), "names of the original authors", "for transformers"
    ),
    "pickled": (lambda f: _rename(f, "pytorch_model.bin"), "pickled weights", "Convert the weights"),
    "TensorFlow": (lambda f: _rename(f, "tf_model.h5"), "TensorFlow's format", "Convert the weights"),
    "only a .gguf": (lambda f: _rename(f, "model.gguf"), "There is a .gguf file", "Use the path of the .gguf file"),
    "shards without index": (
        lambda f: (_shard(f), (f / INDEX_FILE).unlink()), f"no {INDEX_FILE}", f"Download {INDEX_FILE}"
    ),
    "a folder too high": (_inside, "There is one in snapshots/0123", "snapshots/0123"),
    "LFS pointer": (lambda f: (f / SINGLE_FILE).write_text(POINTER), "Git LFS pointer", "git lfs pull"),
    "LFS pointer config": (lambda f: (f / "config.json").write_text(POINTER), "Git LFS pointer", "git lfs pull"),
    "web page": (lambda f: (f / SINGLE_FILE).write_text("<!doctype html><p>"), "is a web page", "/resolve/"),
    "empty": (lambda f: (f / SINGLE_FILE).write_bytes(b""), "it is empty", "again"),
    "empty config": (lambda f: (f / "config.json").write_bytes(b""), "it is empty", "again"),
    "broken link": (lambda f: _broken_link(f / SINGLE_FILE), "a link to ../../blobs/0123", "cp -rL"),
    "broken link config": (lambda f: _broken_link(f / "config.json"), "a link to ../../blobs/0123", "cp -rL"),
    "weights twice": (_with_both, "and also model-00001-of", "Move the files"),
    "key twice": (_twice_in_json, "key 'hidden_size' occurs twice", "again"),
    "config nested too deeply": (
        lambda f: (f / "config.json").write_text("[" * 100_000), "nested too deeply", "again"
    ),
    "compiled": (_prefixed("_orig_mod."), "unexpected", "'_orig_mod.', a prefix of torch.compile"),
    "multimodal, older": (_prefixed("language_model."), "unexpected", "a multimodal model"),
    "multimodal, newer": (
        lambda f: _edit_weights(f, lambda t: {n.replace("model.", "model.language_model."): x for n, x in t.items()}),
        "unexpected", "a multimodal model",
    ),
    "peft": (_prefixed("base_model.model."), "unexpected", "a prefix of peft"),
    "adapter inside": (
        lambda f: _edit_weights(f, lambda t: t.update({"model.layers.0.x.lora_A.weight": torch.ones(2)})),
        "unexpected", "merge_and_unload",
    ),
    "without its head": (_stripped, "missing", "The names lack 'model.'"),
    "transposed": (
        lambda f: _edit_weights(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()})),
        "lm_head.weight has shape [64, 512]", "transpose",
    ),
    "eight bits": (
        lambda f: _edit_weights(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
        "stored as F8_E4M3", "unquantized",
    ),
    "quantized": (
        lambda f: _edit_weights(f, lambda t: t.update({"lm_head.weight_scale": torch.ones(1)})),
        "unexpected", "unquantized",
    ),
    "index lacks a tensor": (
        lambda f: _shard(f, lambda m: m.pop("model.norm.weight")), "contains model.norm.weight", "different versions"
    ),
    "index names a tensor too many": (
        lambda f: _shard(f, lambda m: m.update({"more": m["model.norm.weight"]})), "it does not contain more", "again"
    ),
    "index names a folder": (
        lambda f: _shard(f, lambda m: m.update({"lm_head.weight": "sub/x.safetensors"})),
        "Shard sub/x", "folder of the index",
    ),
    "index names nothing": (
        lambda f: _shard(f, lambda m: m.update({"lm_head.weight": None})), "Shard None is missing", "Complete"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_error_for_a_bad_folder_names_the_problem_and_the_next_step(case: str, folder: Path) -> None:
    spoil, what, next_step = CASES[case]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert what in caught.value.what
    assert next_step in (caught.value.next_step or "")
    assert (caught.value.where or "").startswith(str(folder))


def _encoded(encoding: str) -> Callable[[Path], object]:
    return lambda f: (f / "config.json").write_text((f / "config.json").read_text(), encoding=encoding)


def _buffers_outside_the_index(folder: Path) -> None:
    name = _shard(folder)["model.norm.weight"]
    tensors = {**load_file(folder / name), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, folder / name)


def _stale_index(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / SINGLE_FILE), "model-00001-of-00001.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": names}))


GOOD: dict[str, Callable[[Path], object]] = {
    "byte order mark": _encoded("utf-8-sig"),
    "UTF-16": _encoded("utf-16"),
    "buffers that the index does not list": _buffers_outside_the_index,
    "an index of files that are not there": _stale_index,
    "config of an adapter without its weights": lambda f: (f / "adapter_config.json").write_text("{}"),
    "other weights that the index does not name": lambda f: (
        _shard(f), save_file({"x": torch.ones(1)}, f / "consolidated.safetensors")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_variants_of_the_same_model_are_read_alike(case: str, folder: Path, whole: Path) -> None:
    GOOD[case](folder)
    checkpoint, expected = Checkpoint.open(folder), Checkpoint.open(whole)
    assert checkpoint.shape == expected.shape
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.read(name), expected.read(name))


def test_all_files_that_transformers_loads_are_copied(folder: Path, tmp_path: Path) -> None:
    names = [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "qwen.tiktoken", "tekken.json", "spiece.model"),
        *("sentencepiece.bpe.model", "tokenizer.model.v3", "chat_template.jinja", "chat_template.json"),
        *("additional_chat_templates/tool_use.jinja", "generation_config.json"),
        *("LICENSE", "License.txt", "LICENCE.md", "NOTICE", "COPYING", "USE_POLICY.md"),
    ]
    others = ["pytorch_model.bin", "modeling_x.py", "optimizer.pt", "README.md", "additional_chat_templates/notes.txt"]
    for name in [*names, *others]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (tmp_path / "out").mkdir()
    copy_side_files(folder, tmp_path / "out")
    found = [file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert sorted(found) == sorted(names)


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", POINTER), ("tokenizer.model", POINTER), ("tokenizer.json", "")]
)
def test_a_missing_tokenizer_file_is_reported_when_the_model_is_copied(
    name: str, text: str, folder: Path, tmp_path: Path
) -> None:
    (folder / name).write_text(text)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as caught:
        copy_side_files(folder, tmp_path / "out")
    assert caught.value.where == str(folder / name)


def test_the_error_for_a_config_file_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no config.json"):
        read_config(tmp_path / "missing")
