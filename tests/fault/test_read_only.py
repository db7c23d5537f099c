"""Read-only folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_minitron.hf.source import resolve_path
from tests.conftest import TOY, Cli
from tests.support.disks import read_only
from tests.support.part_runs import computed, copy_before


def _require_told(code: int, output: str, where: Path) -> None:
    assert code == 2, output
    assert output.count("error:") == 1
    assert "Traceback" not in output
    flat = " ".join(output.split())
    assert "The disk is read-only." in flat
    assert f"where: {where}" in flat
    assert "then run the same command again" in flat


@pytest.mark.parametrize("where", ["", "toy/width", "toy/width/.work"])
def test_a_run_that_cannot_be_written(where: str, toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = copy_before(toy_run, root, "select")
    command = ("run", TOY, f"execution.run_root={root}", "--until", "select")
    with read_only(root / where):
        code, output = minitron(*command)
    _require_told(code, output, root / where)
    assert not (run / "select").exists()
    assert not list(run.glob(".partial-*"))
    code, output = minitron(*command)
    assert code == 0, output
    assert computed(run / "select") == computed(toy_run / "toy/width/select")


def test_a_finished_run_can_be_looked_at(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    shutil.copytree(toy_run, tmp_path / "runs")
    root = f"execution.run_root={tmp_path / 'runs'}"
    with read_only(tmp_path / "runs"):
        code, output = minitron("status", TOY, root, "--verify")
        assert code == 0, output
        code, output = minitron("report", TOY, root)
    _require_told(code, output, tmp_path / "runs/toy/width")


def test_text_and_models_are_read_from_read_only_folders(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(resolve_path("asset:toy-llama", tmp_path), there / "model")
    shutil.copy(resolve_path("asset:toy-text", tmp_path), there / "text.jsonl.zst")
    sources = (
        f"stages.teacher.source={there / 'model'}",
        f"stages.data.sources=[{{source: '{there / 'text.jsonl.zst'}'}}]",
    )
    with read_only(there):
        code, output = minitron("run", TOY, f"execution.run_root={tmp_path}", *sources, "--until", "data")
    assert code == 0, output
    assert computed(tmp_path / "toy/width/teacher") == computed(toy_run / "toy/width/teacher")


def test_a_cache_of_the_hub_that_cannot_be_written_serves_what_it_has(
    toy_run: Path, minitron: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    repository, commit = cache / "models--someone--toy", "1" * 40
    shutil.copytree(resolve_path("asset:toy-llama", tmp_path), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = ("run", TOY, f"execution.run_root={tmp_path}", "--until", "teacher")
    with read_only(cache):
        code, output = minitron(*command, "stages.teacher.source=hf:someone/other")
        assert code == 2, output
        assert "someone/other could not be fetched" in " ".join(output.split())
        assert "Traceback" not in output
        code, output = minitron(*command, "stages.teacher.source=hf:someone/toy")
    assert code == 0, output
    assert computed(tmp_path / "toy/width/teacher") == computed(toy_run / "toy/width/teacher")


def test_a_folder_for_assets_that_cannot_be_written(minitron: Cli, tmp_path: Path) -> None:
    with read_only(tmp_path):
        code, output = minitron("assets", "fetch", "--assets-dir", tmp_path)
    assert code == 2, output
    flat = " ".join(output.split())
    assert "The assets cannot be written" in flat
    assert str(tmp_path) in flat
    assert "Choose another folder with --assets-dir" in flat
