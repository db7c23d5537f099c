"""A training on rewards whose runner, server or actor is killed leaves nothing behind, and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.conftest import REPO
from tests.e2e.test_toy_rewards import BEFORE
from tests.support.aligner import require_aligner
from tests.support.processes import MARK, mark_of, marked, output_of, runs_in_a_fork, wait_for_step

pytestmark = pytest.mark.slow

SETTINGS = {"num_steps": 6, "prompts_per_step": 16, "valid_interval_steps": 2, "num_valid_prompts": 16}
END_S = 20.0


def start(kind: str, root: Path) -> subprocess.Popen[str]:
    overrides = [f"stages.{kind}.{name}={value}" for name, value in SETTINGS.items()]
    batch = "16" if kind == "ppo" else "32"
    command = [sys.executable, "-m", "nemo_minitron", "run", f"recipes/toy/{kind}.yaml", f"execution.run_root={root}"]
    process = subprocess.Popen(
        [*command, *overrides, f"stages.{kind}.global_batch_size={batch}", "stages.sft.num_steps=20", "--until", kind],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", MARK: uuid4().hex},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages before the training."""
    require_aligner()
    root = tmp_path_factory.mktemp("before")
    command = [sys.executable, "-m", "nemo_minitron", "run", "recipes/toy/reinforce.yaml", f"execution.run_root={root}"]
    subprocess.run([*command, "stages.sft.num_steps=20", "--until", "sft"], cwd=REPO, check=True)
    return root / "toy/reinforce"


def victim(process: subprocess.Popen[str], what: str) -> psutil.Process:
    """Return the runner, the actor, or a process of a server."""
    if what == "runner":
        return psutil.Process(process.pid)
    mark = mark_of(process)
    if what == "actor":
        return next(one for one in marked(mark) if runs_in_a_fork(one))
    words = {
        "rule server": "rule_server/task.json",
        "critic": "critic/task.json",
        "triton": "tritonserver",
        "evaluator": "rewards",
    }[what]
    found = [one for one in marked(mark) if any(word.endswith(words) for word in one.cmdline())]
    assert found, what
    return found[0]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *(("reinforce", what) for what in ("runner", "actor", "rule server", "triton", "evaluator", "SIGTERM")),
        *(("ppo", what) for what in ("runner", "actor", "critic", "SIGTERM")),
    ],
)
def test_a_kill_leaves_nothing_behind_and_the_same_command_goes_on(
    kind: str, what: str, before: Path, tmp_path: Path
) -> None:
    run = tmp_path / "toy" / kind
    for stage in BEFORE:
        shutil.copytree(before / stage, run / stage)
    first = start(kind, tmp_path)
    mark = mark_of(first)
    curves = run / f".work/{kind}/training/curves.jsonl"
    wait_for_step(curves, 3, first, timeout_s=600)
    if what == "SIGTERM":
        first.send_signal(signal.SIGTERM)
    else:
        victim(first, what).kill()
    output = output_of(first, 200)
    assert first.returncode == (130 if what == "SIGTERM" else -signal.SIGKILL if what == "runner" else 2), output
    require_nothing_left(mark)
    steps_before = [json.loads(line)["step"] for line in curves.read_text().splitlines()]
    second = start(kind, tmp_path)
    output = output_of(second, 900)
    assert second.returncode == 0, output
    rows = [json.loads(line) for line in (run / kind / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4, 5, 6]
    # It went on from a checkpoint: the start is not measured again.
    assert sum(row["step"] == 0 for row in rows) == 1
    assert max(steps_before) >= 2


def require_nothing_left(mark: str) -> None:
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline and list(marked(mark)):
        time.sleep(0.2)
    left = [found.cmdline() for found in marked(mark)]
    assert not left, left
