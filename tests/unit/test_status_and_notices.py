"""Status of a run in progress: in the terminal, on a page, and through the notify command."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.backends.alignment.base import CURVES_FILE
from nemo_minitron.backends.alignment.nemo_aligner.backend import TRAIN_LOSS, VALID_LOSS
from nemo_minitron.plan.describe import status_facts
from nemo_minitron.report.status_page import HEIGHT, MARGIN, WIDTH, curve, render_status
from nemo_minitron.system.notify import notify
from nemo_minitron.system.outer_job import SCRIPT_NAMES
from tests.conftest import REPO, TOY, Cli

CURVES_OF_A_RUN = REPO / "tests/data/older_run/distill/curves.jsonl"
EVIL = "<script>alert(1)</script>"


def _running(root: Path) -> Path:
    """Return a toy run whose distillation is running."""
    run = root / "toy/width"
    work = run / ".work/distill"
    work.mkdir(parents=True)
    progress = {"description": "distill", "done": 12, "total": 40, "unit": "steps", "eta_s": 10800.0}
    (work / "progress.json").write_text(json.dumps({**progress, "fields": {"loss": "2.5"}, "time": 0}))
    rows = CURVES_OF_A_RUN.read_text().splitlines(keepends=True)
    (work / "curves.jsonl").write_text("".join(rows[:12]) + "{")
    (run / "logs").mkdir()
    (run / "logs/distill.log").write_text(f"first\n{EVIL}\n")
    return run


def test_status_shows_progress_time_left_and_jobs(tmp_path: Path) -> None:
    _running(tmp_path)
    plan = load_plan(TOY, [f"execution.run_root={tmp_path}"])
    job = {"job": "77", "state": "running", "reason": "", "restarts": 2, "used": "", "left": "", "nodes": "node1"}
    stages = status_facts(plan, verify=False, jobs={"distill": job})["stages"]
    assert stages["distill"]["status"] == "12/40 steps"
    assert stages["distill"]["summary"] == "loss 2.5 left 3 h 0 min"
    assert stages["distill"]["job"]["restarts"] == 2
    assert stages["score"]["job"] is None


def test_the_page_is_complete_and_escapes_logs(tmp_path: Path, minitron: Cli) -> None:
    _running(tmp_path)
    page = tmp_path / "status.html"
    code, output = minitron("status", TOY, f"execution.run_root={tmp_path}", "--html", page)
    assert code == 0, output
    text = page.read_text()
    assert "0 of 16 stages have finished" in text
    assert "12/40 steps" in text
    assert "<polyline points=" in text
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r'(src|href)="', text), "it needs no other file"
    assert list(tmp_path.glob(".*")) == []


def test_the_curve_of_a_training_by_the_alignment_backend_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / ".work/sft/training"
    folder.mkdir(parents=True)
    rows = [{"step": 0, VALID_LOSS: 4.0}, *({"step": step, TRAIN_LOSS: 4.0 / step} for step in (1, 2))]
    (folder / CURVES_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"status": "2/9 steps", "took": "", "summary": "", "running": True, "eta": "", "job": None}
    page = render_status({"name": "r", "run_dir": str(tmp_path), "stages": {"sft": stage}}, reload_s=5)
    assert curve([4.0, 2.0]) in page


def test_logs_are_shown_without_secrets(tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_API_TOKEN", "hunter2-of-the-shell")
    log = _running(tmp_path) / "logs/slurm/distill-12.log"
    log.parent.mkdir()
    log.write_text("module: hunter2-of-the-shell\nlogin as hunter2-of-the-recipe\nhttps://me:hunter2@host/\n")
    page = tmp_path / "status.html"
    keys = [f"execution.run_root={tmp_path}", "execution.cluster.environment.SITE_KEY=hunter2-of-the-recipe"]
    code, output = minitron("status", TOY, *keys, "--html", page)
    assert code == 0, output
    assert "module: ***\nlogin as ***\nhttps://me:***@host/" in page.read_text()
    code, output = minitron("logs", TOY, "distill", *keys)
    assert code == 0, output
    assert "module: ***\nlogin as ***\nhttps://me:***@host/" in output


def test_the_status_page_needs_no_plotting_library() -> None:
    program = "import sys, nemo_minitron.report.status_page; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_page_can_be_made_before_anything_has_run(tmp_path: Path) -> None:
    plan = load_plan(TOY, [f"execution.run_root={tmp_path}"])
    assert "0 of 16" in render_status(status_facts(plan, verify=False), reload_s=5)


def test_a_curve_goes_from_left_to_right_and_down() -> None:
    points = [tuple(map(float, pair.split(","))) for pair in curve([4.0, float("nan"), 3.0, 2.0]).split()]
    assert points[0] == (MARGIN, MARGIN)
    assert points[-1] == (WIDTH - MARGIN, HEIGHT - MARGIN)
    assert curve([1.0]) == ""
    assert len(curve([float(i) for i in range(10_000)]).split()) <= 200


def test_a_stage_that_ends_calls_the_users_program(tmp_path: Path, minitron: Cli) -> None:
    program = (
        "import os, sys; keys = ('RUN', 'STAGE', 'STATUS', 'MESSAGE'); "
        "print(*(os.environ['MINITRON_' + key] for key in keys), file=open(sys.argv[1], 'a'))"
    )
    heard = tmp_path / "heard; touch pwned"
    command = json.dumps([sys.executable, "-c", program, str(heard)])
    overrides = [f"execution.run_root={tmp_path}", f"execution.notify_command={command}"]
    code, output = minitron("run", TOY, *overrides, "--until", "select_random")
    assert code == 0, output
    assert heard.read_text() == "toy/width teacher finished \ntoy/width select_random finished \n"
    (tmp_path / "toy/width/teacher/model.safetensors").write_bytes(b"")
    code, _ = minitron("run", TOY, *overrides, "--until", "prune_random")
    assert code == 2
    assert (
        heard.read_text().splitlines()[2].startswith("toy/width prune_random failed model.safetensors of stage teacher")
    )
    assert not list(tmp_path.glob("pwned"))


def test_the_users_program_can_start_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SCRIPT_NAMES:
        monkeypatch.setenv(name, "2")
    seen = tmp_path / "seen"
    notify(["sh", "-c", f"env >'{seen}'"], run="toy", stage="distill", status="finished")
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert {name for name in names if name.startswith("MINITRON_")} >= {"MINITRON_RUN", "MINITRON_STAGE"}
    assert not names & set(SCRIPT_NAMES)


@pytest.mark.parametrize("command", [("/nowhere/program",), (sys.executable, "-c", "raise SystemExit(1)")])
def test_a_program_that_fails_is_a_warning(command: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        notify(command, run="r", stage="s", status="failed", message="why\0")
    assert "notify_command failed" in caplog.text
