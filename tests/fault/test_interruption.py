"""A distillation that is killed, and a second runner of the same run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import REPO, TOY

DISTILL = ["stages.distill.num_steps=24", "stages.distill.save_interval_steps=5", "--until", "distill"]


def _command(root: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "nemo_minitron", "run", str(TOY), f"execution.run_root={root}", *DISTILL, *extra]


def _start(root: Path, *extra: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        _command(root, *extra), cwd=REPO, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _wait_for_step(curves: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if curves.is_file() and any(json.loads(line)["step"] >= step for line in curves.read_text().splitlines()[:-1]):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("the distillation did not reach this step")


def test_a_killed_distillation_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = _start(tmp_path / "whole")
    assert whole.wait(300) == 0, whole.communicate()[1]

    cut = _start(tmp_path / "cut")
    work = tmp_path / "cut/toy/width/.work/distill"
    _wait_for_step(work / "curves.jsonl", 12, cut)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    root = tmp_path / "cut/toy/width"
    assert not (root / "distill").exists(), "nothing may be published"
    assert [path.name for path in sorted((work / "checkpoints").glob("step_*"))] == ["step_00000005", "step_00000010"]
    used = json.loads((work / "data_used.json").read_text())
    assert [source["tokens"] for source in used] == [10 * 8 * 128], "the tokens up to the newest checkpoint"

    again = _start(tmp_path / "cut")
    _, output = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "distill 10/24" in output, "it must resume from the checkpoint"
    results = [tmp_path / run / "toy/width/distill" for run in ("whole", "cut")]
    first, second = (folder.joinpath("model.safetensors").read_bytes() for folder in results)
    assert first == second
    curves = [[json.loads(line) for line in folder.joinpath("curves.jsonl").open()] for folder in results]
    for rows in curves:
        for row in rows:
            row.pop("tokens_per_s", None)
            row.pop("mfu", None)
    assert curves[0] == curves[1]
    uses = [json.loads((folder / "data_used.json").read_text()) for folder in results]
    assert uses[0] == uses[1]
    assert uses[0][0]["tokens"] == 24 * 8 * 128
    assert not work.exists(), "the work folder is removed when the stage is published"
    assert not list(root.glob(".partial-*"))


def test_a_second_runner_reports_the_first(tmp_path: Path) -> None:
    first = _start(tmp_path, "stages.distill.num_steps=50000")
    try:
        _wait_for_step(tmp_path / "toy/width/.work/distill/curves.jsonl", 1, first)
        second = _start(tmp_path, "stages.distill.num_steps=50000")
        _, output = second.communicate(timeout=120)
        assert second.returncode == 2
        assert f"Another runner works on this run: process {first.pid}" in output
        assert "Traceback" not in output
    finally:
        first.send_signal(signal.SIGINT)
        _, output = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "the same command continues" in output
    assert "repeated text adds less and less" in " ".join(output.split()), "there is too little text for 50000 steps"
