"""A whole pipeline that is killed at fifty random moments ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from nemo_minitron.artifacts.manifest import sha256_of
from tests.conftest import REPO, TOY
from tests.support.processes import MARK, marked

NUM_KILLS, SEED = 50, 11
STEPS = ("stages.distill.num_steps=24", "stages.distill.save_interval_steps=2", "stages.distill.warmup_steps=2")
UNTIL = "export"
SAME = ("model.safetensors", "scores.safetensors", "prune_plan.json", "data_used.json", "data.json", "metrics.json")
"""Files that must be bit-equal: all computed ones, without times and folders."""


def _command(root: Path) -> list[str]:
    run = [sys.executable, "-m", "nemo_minitron", "run", str(TOY), "--until", UNTIL]
    return [*run, f"execution.run_root={root}", *STEPS]


def _kill_all(mark: str) -> None:
    """Kill every process of the run at once, as when a machine loses power."""
    found = list(marked(mark))
    for process in found:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(found, timeout=20)


def _computed(root: Path) -> dict[str, str]:
    run = root / "toy/width"
    files = [file for name in SAME for file in run.glob(f"[a-z]*/{name}")]
    return {
        str(file.relative_to(run)): sha256_of(file) for file in files if not file.parent.name.startswith("evaluate")
    }


@pytest.mark.slow
def test_fifty_random_kills_over_the_pipeline_change_no_bit(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, cut, generator = tmp_path / "whole", tmp_path / "cut", random.Random(SEED)
    started_s = time.monotonic()
    subprocess.run(_command(whole), cwd=REPO, env=environment, check=True, capture_output=True, timeout=900)
    # A busy machine needs longer.
    max_delay_s = (time.monotonic() - started_s) / 4
    killed_in: list[str] = []
    finished = 0
    for _ in range(NUM_KILLS):
        mark = uuid4().hex
        process = subprocess.Popen(
            _command(cut), cwd=REPO, env={**environment, MARK: mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(generator.uniform(1.0, max_delay_s))
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1].decode()
            break
        work = cut / "toy/width/.work"
        killed_in += [path.name for path in work.glob("[a-z]*")] or ["start"]
        _kill_all(mark)
        process.wait()
        before, finished = finished, len(list((cut / "toy/width").glob("[a-z]*/manifest.json")))
        if finished == before:  # the machine is busier than before: too short to finish a stage
            max_delay_s *= 1.1
    done = subprocess.run(
        _command(cut), cwd=REPO, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(killed_in) >= 10, "it went too fast to be disturbed"
    assert "distill" in killed_in
    expected = _computed(whole)
    assert {"distill/model.safetensors", "prune/model.safetensors"} <= set(expected)
    assert _computed(cut) == expected
    assert not list((cut / "toy/width").glob(".partial-*"))
    rows = [json.loads(line) for line in (cut / "toy/width/distill/curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
