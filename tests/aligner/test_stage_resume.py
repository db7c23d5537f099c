"""A stage of NeMo-Aligner's that is killed goes on from its checkpoint, and ends as an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import REPO
from tests.support.processes import output_of, wait_for_step

pytestmark = pytest.mark.slow

RECIPE = REPO / "recipes/toy/aligned.yaml"
SETTINGS = ["stages.dpo.num_steps=12", "stages.dpo.valid_interval_steps=4", "stages.distill.num_steps=8"]


def _start(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nemo_minitron", "run", str(RECIPE), f"execution.run_root={root}", *SETTINGS]
    return subprocess.Popen(
        [*command, "--until", "dpo"],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _curve(run: Path, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / stage / "curves.jsonl").read_text().splitlines()]
    figures = ("step", "train/loss", "train/grad_norm", "val/loss")
    return [{key: row[key] for key in figures if key in row} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    process = _start(root)
    told = output_of(process, 900)
    assert process.returncode == 0, told
    return root / "toy/aligned"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_sft_and_dpo_go_on_after_the_runner_has_gone(how: str, undisturbed: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut/toy/aligned"
    for stage, step in (("sft", 25), ("dpo", 6)):
        process = _start(tmp_path / "cut")
        wait_for_step(cut / f".work/{stage}/training/curves.jsonl", step, process, timeout_s=600)
        process.send_signal(getattr(signal, how))
        told = output_of(process, 120)
        assert process.returncode == (130 if how == "SIGTERM" else -signal.SIGKILL), told
        assert not (cut / stage).exists()
    last = _start(tmp_path / "cut")
    told = output_of(last, 900)
    assert last.returncode == 0, told
    for stage in ("sft", "dpo"):
        one, other = (_curve(run, stage) for run in (undisturbed, cut))
        # A stop makes a validation of its own.
        trained, expected = ([row for row in rows if "train/loss" in row] for rows in (other, one))
        assert [row["step"] for row in trained] == [row["step"] for row in expected]
        for row, wanted in zip(trained, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-6), stage
        weights, wanted_weights = (load_file(run / stage / "model.safetensors") for run in (cut, undisturbed))
        for name, wanted_tensor in wanted_weights.items():
            assert weights[name].float().numpy() == pytest.approx(wanted_tensor.float().numpy(), abs=1e-6), name
