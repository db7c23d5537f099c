"""An installed package adds a kind of stage by an entry point, without any edit of nemo-minitron."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

PACKAGE = REPO / "tests" / "data" / "stage_package"
RECIPE = """
defaults: [_self_]
stages:
  teacher: {kind: import, source: "asset:toy-llama"}
  letters: {kind: count_letters, letter: a}
  report: {}
execution:
  parallel: {dp: 2}
"""


def _minitron(folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{PACKAGE}{os.pathsep}{REPO}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "letters.yaml"
    file.write_text(RECIPE)
    return file


def test_a_stage_of_another_package_is_checked_planned_run_resumed_and_reported(tmp_path: Path, recipe: Path) -> None:
    code, output = _minitron(tmp_path, "check", "letters.yaml", "stages.letters.letter='7'")
    assert code == 2
    assert "stages.letters.letter = 7: is a digit. Allowed: a letter." in output
    code, output = _minitron(tmp_path, "check", "letters.yaml", "stages.letters.lettre=b")
    assert code == 2
    assert "stages.letters.lettre: unknown key. Did you mean letter?" in output

    code, output = _minitron(tmp_path, "plan", "letters.yaml", "--json")
    assert code == 0, output
    (planned,) = [stage for stage in json.loads(output)["stages"] if stage["name"] == "letters"]
    assert (planned["kind"], planned["processes"], planned["inputs"]) == ("count_letters", 2, {"model": "teacher"})

    code, output = _minitron(tmp_path, "run", "letters.yaml")
    assert code == 2
    assert "The first attempt always fails." in output
    code, output = _minitron(tmp_path, "run", "letters.yaml")
    assert code == 0, output

    run = tmp_path / "runs" / "letters"
    manifest = json.loads((run / "letters/manifest.json").read_text())
    vocab = json.loads((run / "teacher/tokenizer.json").read_text())["model"]["vocab"]
    assert manifest["result"]["attempts"] == 2
    assert manifest["result"]["num_letters"] == sum(token.count("a") for token in vocab)
    report = json.loads((run / "report.json").read_text())
    assert [row["kind"] for row in report["lineage"]] == ["import", "count_letters"]
    (cost,) = [row for row in report["cost"]["stages"] if row["stage"] == "letters"]
    assert cost["tokens"] == len(vocab)
    assert "count letters" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("nemo_minitron.stages.distill.kind:DISTILL", "adds the kind of stage `distill`, which already exists."),
        ("gone.kind:DISTILL", "cannot be imported: ModuleNotFoundError: No module named 'gone'."),
        ("nemo_minitron.stages.distill.kind:GONE", "cannot be imported: AttributeError: module"),
    ],
)
def test_a_package_with_a_wrong_kind_is_named(kind: str, problem: str, tmp_path: Path, recipe: Path) -> None:
    other = tmp_path / "site" / "other-2.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text(f"[nemo_minitron.stages]\ndistill = {kind}\n")
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "check", "letters.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{REPO}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"other {problem}" in " ".join(done.stderr.split())
    assert f"entry point distill = {kind}" in " ".join(done.stderr.split())
    assert "Fix or uninstall that package." in done.stderr
