"""Damaged published files: the stage that reads a truncated or changed file names it and the solution."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_minitron.artifacts import compared
from nemo_minitron.artifacts.store import Store
from nemo_minitron.errors import ArtifactError
from tests.conftest import REPO, TOY, Cli
from tests.support.part_runs import computed, copy_before, cut, flip

CACHED = REPO / "recipes/toy/cached.yaml"
Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Row:
    """A file, and the first stage that reads it after the stage that made it."""

    file: str
    reader: str

    @property
    def maker(self) -> str:
        return self.file.split("/")[0]


TABLE = (
    Row("teacher/model.safetensors", "check_teacher"),
    Row("teacher/config.json", "score"),
    Row("teacher/tokenizer.json", "data"),
    Row("data/data.json", "check_teacher"),
    Row("data/train_00.bin", "score"),
    Row("data/train_00.idx", "score"),
    Row("data/valid_00.bin", "evaluate_pruned"),
    Row("data/valid_00.bytes.npy", "evaluate_pruned"),
    Row("score/scores.safetensors", "select"),
    Row("select/prune_plan.json", "prune"),
    Row("prune/model.safetensors", "distill"),
    Row("distill/model.safetensors", "evaluate_distilled"),
    Row("distill/curves.jsonl", "report"),
    Row("evaluate_distilled/metrics.json", "export"),
    Row("speed/speed.json", "report"),
)


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.file)
def test_a_damaged_file_is_found_before_it_is_used(
    row: Row, damage: Damage, toy_run: Path, minitron: Cli, tmp_path: Path
) -> None:
    run = copy_before(toy_run, tmp_path, row.reader)
    damage(run / row.file)
    code, output = minitron("run", TOY, f"execution.run_root={tmp_path}", "--until", row.reader)
    _require_told(code, output, run, row)
    assert f"--rerun {row.maker}" in output


def _require_told(code: int, output: str, run: Path, row: Row) -> None:
    assert code == 2, output
    assert output.count("error:") == 1
    assert "Traceback" not in output
    name = Path(row.file).name
    assert f"{name} of stage {row.maker} was changed or damaged after the stage finished." in " ".join(output.split())
    assert str(run / row.file) in output
    assert not (run / row.reader).exists()
    assert not list(run.glob(".partial-*"))


@pytest.mark.parametrize(
    ("row", "damage"),
    [(Row("teacher/config.json", "data"), cut), (Row("select/prune_plan.json", "prune"), flip)],
    ids=["teacher", "select"],
)
def test_the_advice_of_the_message_repairs_the_artifact(
    row: Row, damage: Damage, toy_run: Path, minitron: Cli, tmp_path: Path
) -> None:
    run = copy_before(toy_run, tmp_path, row.reader)
    damage(run / row.file)
    command = ("run", TOY, f"execution.run_root={tmp_path}", "--until", row.reader)
    assert minitron(*command)[0] == 2
    code, output = minitron(*command, "--rerun", row.maker)
    assert code == 0, output
    for stage in (row.maker, row.reader):
        assert computed(run / stage) == computed(toy_run / "toy/width" / stage)
    assert (run / ".superseded" / f"{row.maker}-1" / Path(row.file).name).is_file()


@pytest.mark.slow
def test_a_damaged_teacher_cache_is_found(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "distill", CACHED, "toy/cached")
    command = ("run", CACHED, f"execution.run_root={tmp_path}", "--until")
    code, output = minitron(*command, "cache_teacher")
    assert code == 0, output
    row = Row("cache_teacher/shard_000001.safetensors", "distill")
    for damage in (flip, cut):
        damage(run / row.file)
        code, output = minitron(*command, "distill")
        _require_told(code, output, run, row)


@pytest.mark.parametrize("stage", ["teacher", "check_teacher", "select"])
@pytest.mark.parametrize("damage", [flip, cut, lambda file: _change_a_figure(file)], ids=["flip", "cut", "figure"])
def test_a_damaged_manifest_is_found(damage: Damage, stage: str, toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "prune")
    damage(run / stage / "manifest.json")
    code, output = minitron("run", TOY, f"execution.run_root={tmp_path}", "--until", "prune")
    assert code == 2, output
    assert "Traceback" not in output
    flat = " ".join(output.split())
    assert "The manifest is damaged" in flat
    assert f"Move {run / stage} away; the stage then runs again." in flat


def _change_a_figure(manifest: Path) -> None:
    """The file is well-formed, but its content is wrong."""
    found = json.loads(manifest.read_text())
    found["result"]["num_params"] = 7
    manifest.write_text(json.dumps(found))


def test_an_adopted_model_is_compared_too(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    model = copy_before(toy_run, tmp_path / "there", "report") / "teacher"
    recipe = tmp_path / "adopted.yaml"
    recipe.write_text(
        f"name: adopted\nstages:\n  teacher: {{kind: adopt, path: {model}}}\n"
        "  select: {method: random, inputs: {scores: null}, target: {ffn_hidden_size: 112}}\n  prune: {}\n"
        f"execution: {{run_root: {tmp_path / 'runs'}, device: cpu}}\n"
    )
    assert minitron("run", recipe, "--until", "select")[0] == 0
    flip(model / "model.safetensors")
    code, output = minitron("run", recipe)
    assert code == 2
    assert "model.safetensors of stage teacher was changed or damaged" in " ".join(output.split())
    assert str(model / "model.safetensors") in output


def test_a_file_is_read_once_and_again_when_it_changed(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(copy_before(toy_run, tmp_path, "report"))
    read: list[str] = []
    whole = compared.file_facts

    def counting(files: list[Path]) -> dict[Path, dict[str, object]]:
        read.extend(file.name for file in files)
        return whole(files)

    monkeypatch.setattr(compared, "file_facts", counting)
    store.artifact("prune", "unverified")
    assert "model.safetensors" in read
    first = len(read)
    store.artifact("prune", "unverified")
    assert len(read) == first
    (store.root / "prune/model.safetensors").touch()
    store.artifact("prune", "unverified")
    assert read[first:] == ["model.safetensors"]
    flip(store.root / "prune/model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors of stage prune"):
        store.artifact("prune", "unverified")


def test_what_remembers_may_be_damaged_too(toy_run: Path, tmp_path: Path) -> None:
    store = Store(copy_before(toy_run, tmp_path, "report"))
    store.artifact("score", "unverified")
    memory = store.root / ".compared/score.json"
    for damage in (flip, cut):
        damage(memory)
        store.artifact("score", "unverified")
    memory.unlink()
    flip(store.root / "score/scores.safetensors")
    with pytest.raises(ArtifactError, match="changed or damaged"):
        store.artifact("score", "unverified")
