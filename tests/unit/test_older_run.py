"""A run of an older version is still read: the toy recipe at commit c387913, in tests/data/older_run.

Files above SMALL_BYTES are left out: of large files, as weights are in other runs, only the sizes are compared.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.artifacts import store
from nemo_minitron.execution.runner import write_recipe
from nemo_minitron.report.lineage import read_lineage
from tests.conftest import REPO, TOY, Cli

FROZEN = REPO / "tests/data/older_run"
SMALL_BYTES = 10_000


@pytest.fixture
def run_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the run_root of the run, with files of zeros in place of those that are left out."""
    monkeypatch.setattr(store, "SMALL_BYTES", SMALL_BYTES)
    run = tmp_path / "toy/width"
    shutil.copytree(FROZEN, run)
    for manifest in run.glob("*/manifest.json"):
        for name, facts in json.loads(manifest.read_text())["files"].items():
            file = manifest.parent / name
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                os.truncate(file, facts["bytes"])
    return tmp_path


def test_status_reads_an_older_run_and_finds_nothing_changed(run_root: Path, minitron: Cli) -> None:
    """A stage reads as `changed` here after the `version` of its kind was raised: then freeze another run."""
    code, output = minitron("status", TOY, f"execution.run_root={run_root}", "--json")
    assert code == 0, output
    stages = json.loads(output)["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(stages, "finished")
    assert stages["evaluate_distilled"]["summary"].startswith("num_params 147,448, bits_per_byte 2.09")


def test_report_reads_an_older_run(run_root: Path, minitron: Cli) -> None:
    code, output = minitron("report", TOY, f"execution.run_root={run_root}")
    assert code == 0, output
    report = json.loads((run_root / "toy/width/report.json").read_text())
    found = {label: round(model["bits_per_byte"], 3) for label, model in report["models"].items()}
    assert found == {"teacher": 1.919, "distilled": 2.09, "pruned": 2.871, "random": 3.413}
    text = (run_root / "toy/width/report.md").read_text()
    for heading in ("Before and after", "Distillation", "What was cut", "Cost", "Training text", "Lineage"):
        assert f"## {heading}\n" in text


def test_the_lineage_of_a_model_is_read_from_its_run() -> None:
    run = store.Store(FROZEN)
    lineage = read_lineage(
        "distill", json.loads((FROZEN / "distill/manifest.json").read_text())["fingerprint"], "teacher", run
    )
    assert [record.stage for record in lineage.line] == ["prune", "distill"]
    assert lineage.missing == ()
    assert lineage.texts() == {"asset:toy-text": ["score", "distill"]}


def test_a_report_with_another_recipe_names_the_stages_that_it_would_change(run_root: Path, minitron: Cli) -> None:
    run = run_root / "toy/width"
    keys = [f"execution.run_root={run_root}", "stages.distill.lr=1e-3"]
    code, output = minitron("report", TOY, *keys)
    assert code == 0, output
    assert "warning" in output
    report = json.loads((run / "report.json").read_text())
    assert report["made_otherwise"]["distill"] == "lr: 0.002 -> 0.001"
    assert report["made_otherwise"]["evaluate_distilled"] == "because distill changes"
    assert "report" not in report["made_otherwise"]
    assert "Made with another recipe than that of this report: distill (lr:" in (run / "report.html").read_text()


def test_the_report_shows_the_recipe_of_the_run_and_not_another_one(run_root: Path, minitron: Cli) -> None:
    run = run_root / "toy/width"
    recipe = load_recipe(TOY, [f"execution.run_root={run_root}", "stages.report.title=of the run"])
    write_recipe(recipe, run / "plan.json")
    code, output = minitron("report", TOY, f"execution.run_root={run_root}", "stages.distill.lr=1e-3")
    assert code == 0, output
    assert "The given recipe would change: distill (lr: 0.002 -> 0.001)" in " ".join(output.split())
    report = json.loads((run / "report.json").read_text())
    assert (report["title"], report["made_otherwise"]) == ("of the run", {})
    page = (run / "report.html").read_text()
    assert "lr: 0.002\n" in page
    assert "The given recipe would change: distill (lr: 0.002 -" in page
    code, output = minitron("report", TOY, f"execution.run_root={run_root}")
    assert code == 0, output
    assert "warning" not in output


def test_a_report_of_accepted_drift_names_the_stages(run_root: Path, minitron: Cli) -> None:
    keys = [f"execution.run_root={run_root}", "stages.distill.lr=1e-3", "--accept-drift", "--rerun", "report"]
    code, output = minitron("run", TOY, *keys)
    assert code == 0, output
    report = json.loads((run_root / "toy/width/report/report.json").read_text())
    assert list(report["made_otherwise"]) == ["distill"]
    assert "drift accepted" in report["made_otherwise"]["distill"]


def test_an_older_run_whose_recipe_has_changed_is_refused_with_the_changed_key(run_root: Path, minitron: Cli) -> None:
    code, output = minitron("run", TOY, f"execution.run_root={run_root}", "stages.distill.lr=1e-3")
    assert code == 2
    assert "lr" in output
    assert "Traceback" not in output
