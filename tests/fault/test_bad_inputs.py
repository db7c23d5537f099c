"""Errors of users, and the message for each: exit code 2, no traceback, no incomplete files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TOY, Cli
from tests.support.tiny_models import tiny_model_dir

Overrides = list[str]


@dataclass(frozen=True)
class Bad:
    """A mistake and its message."""

    what: str
    overrides: Callable[[Path], Overrides]
    message: tuple[str, ...]
    until: str = "teacher"


def _model(change: Callable[[Path], None]) -> Callable[[Path], Overrides]:
    """Return overrides whose teacher is a copy of a tiny model, damaged by `change`."""

    def make(folder: Path) -> Overrides:
        model = tiny_model_dir(folder / "model", "llama_gqa_tied", intermediate_size=192)
        change(model)
        return [f"stages.teacher.source={model}"]

    return make


def _text(name: str, content: bytes) -> Callable[[Path], Overrides]:
    def make(folder: Path) -> Overrides:
        (folder / name).write_bytes(content)
        return [f"stages.data.sources=[{{source: '{folder / name}'}}]"]

    return make


def _truncate(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def _other_tokenizer(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = {
        token: number + (config["vocab_size"] if number > 255 else 0)
        for token, number in tokenizer["model"]["vocab"].items()
    }
    file.write_text(json.dumps(tokenizer))


def _corrupt_gguf(folder: Path) -> Overrides:
    (folder / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + os.urandom(4096))
    return [f"stages.teacher.source={folder / 'model.gguf'}"]


TABLE = (
    Bad("unknown key", lambda _: ["stages.distill.learning_rate=1"], ("stages.distill.learning_rate: unknown key",)),
    Bad("misspelt key", lambda _: ["stages.distill.warmup_step=1"], ("Did you mean warmup_steps?",)),
    Bad(
        "several problems at once",
        lambda _: ["stages.distill.lr=-1", "execution.paralel={}"],
        ("2 problems", "stages.distill.lr = -1", "execution.paralel: unknown key. Did you mean parallel?"),
    ),
    Bad(
        "heads that do not divide",
        lambda _: ["stages.select.target.num_attention_heads=3"],
        (
            "stages.select.target.num_attention_heads = 3: the model cannot be pruned to this. "
            "Allowed: a multiple of num_query_groups = 2, such as 2 or 4.",
        ),
    ),
    Bad(
        "larger than the teacher",
        lambda _: ["stages.select.target.ffn_hidden_size=193"],
        ("stages.select.target.ffn_hidden_size = 193: the model cannot be pruned to this. Allowed: 1 to 192.",),
    ),
    Bad(
        "a layout that does not divide",
        lambda _: ["execution.parallel.tp=3"],
        ("execution.parallel.tp = 3: does not divide all of", "Allowed: 1, 2."),
    ),
    Bad("missing model", lambda folder: [f"stages.teacher.source={folder}/nowhere"], ("no such file or folder",)),
    Bad("missing text", lambda folder: [f"stages.data.sources=[{{source: {folder}/no.txt}}]"], ("no such file",)),
    Bad(
        "wrong architecture",
        lambda _: ["++stages.teacher.architecture.hidden_size=128", *_ARCHITECTURE],
        ("Wrong architecture", "hidden_size = 64 (recipe: 128)"),
    ),
    Bad("truncated safetensors", _model(_truncate), ("model.safetensors", "damaged or cut off")),
    Bad("corrupt GGUF", _corrupt_gguf, ("The GGUF file cannot be read", "model.gguf")),
    Bad("tokenizer mismatch", _model(_other_tokenizer), ("beyond the model's vocabulary",), until="data"),
    Bad("empty data", _text("empty.txt", b""), ("empty.txt",), until="data"),
    Bad("data that is not UTF-8", _text("latin.txt", "caf\u00e9 ".encode("latin-1") * 9), ("not UTF-8",), until="data"),
    Bad("bad JSON row", _text("x.jsonl", b'{"text": "a"}\n{"text": \n'), ("x.jsonl", "2"), until="data"),
    Bad("row without text", _text("x.jsonl", b'{"body": "a"}\n'), ("text", "body"), until="data"),
)
_ARCHITECTURE = [
    f"++stages.teacher.architecture.{key}={value}"
    for key, value in {
        "architectures": "[LlamaForCausalLM]",
        "num_hidden_layers": 4,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }.items()
]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.what)
def test_a_mistake_gets_one_clear_message(bad: Bad, minitron: Cli, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    code, output = minitron(
        "run", TOY, f"execution.run_root={root}", "name=bad", *bad.overrides(tmp_path), "--until", bad.until
    )
    assert code == 2, output
    assert "Traceback" not in output
    assert "unexpected" not in output
    flat = " ".join(output.split())
    for words in bad.message:
        assert words in flat
    assert not (root / "bad" / bad.until).exists(), "no partial output"
    assert not list((root / "bad").glob(".partial-*"))


def test_a_full_disk_keeps_what_had_finished(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=600k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("a small disk can only be mounted by root")
    try:
        code, output = minitron("run", TOY, f"execution.run_root={disk}", "--until", "prune")
        assert code == 2, output
        assert "The disk is full; no partial file was kept." in " ".join(output.split())
        assert "Traceback" not in output
        run = disk / "toy/width"
        assert not list(run.glob(".partial-*"))
        finished = [path.parent.name for path in run.glob("*/manifest.json")]
        os.system(f"mount -o remount,size=50m {disk}")
        code, output = minitron("run", TOY, f"execution.run_root={disk}", "--until", "prune")
        assert code == 0, output
        for stage in finished:
            assert f"{stage} (" not in output, "a finished stage is not run again"
    finally:
        os.system(f"umount -l {disk}")  # a reader may still hold a file


def test_a_missing_permission_to_write_is_reported(minitron: Cli, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        for parent in (locked, *locked.parents):
            if parent.stat().st_mode & 0o005 != 0o005:
                parent.chmod(parent.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        code, output = minitron("run", TOY, f"execution.run_root={locked}/runs", "--until", "teacher")
    finally:
        if root:
            os.seteuid(0)
    assert code == 2, output
    assert "No permission to write here." in " ".join(output.split())
    assert "Traceback" not in output


def test_a_damaged_artifact_is_found_before_it_is_used(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    shutil.copytree(toy_run, tmp_path / "runs")
    root = tmp_path / "runs/toy/width"
    shutil.rmtree(root / "select")
    (root / "score/scores.safetensors").write_bytes(b"short")
    code, output = minitron("run", TOY, f"execution.run_root={tmp_path / 'runs'}", "--until", "select")
    assert code == 2
    flat = " ".join(output.split())
    assert "scores.safetensors of stage score was changed or damaged" in flat
    assert "--rerun score" in flat
