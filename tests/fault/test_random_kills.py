"""A training that is killed at twenty random moments ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from nemo_minitron.stages.distill.params import DistillStage
from tests.support.distributed import process_context
from tests.support.training_child import distill_to_the_end

NUM_STEPS, NUM_KILLS, SEED = 60, 20, 7
PARAMS = DistillStage(
    kind="distill",
    num_steps=NUM_STEPS,
    global_batch_size=8,
    seq_len_tokens=128,
    lr=2e-3,
    min_lr=2e-4,
    warmup_steps=5,
    precision="fp32",
    valid_interval_steps=10,
    valid_num_tokens=2048,
    save_interval_steps=3,
)
"""Overrides of recipes/toy/width.yaml: more steps and more checkpoints."""


def _rows(curves: Path) -> list[dict[str, float]]:
    rows = []
    for line in curves.read_text().splitlines() if curves.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _kill_after(child: BaseProcess, curves: Path, step: int, delay_s: float) -> bool:
    """Send SIGKILL some time after the step, and return whether the training was still running."""
    while child.is_alive() and not any(row["step"] >= step for row in _rows(curves)):
        time.sleep(0.002)
    time.sleep(delay_s)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_twenty_random_kills_change_no_bit(toy_run: Path, tmp_path: Path) -> None:
    run, context, generator = toy_run / "toy/width", process_context(), random.Random(SEED)
    folders = {"student": run / "prune", "teacher": run / "teacher", "data": run / "data"}
    works = {name: tmp_path / name for name in ("whole", "cut")}
    for work in works.values():
        work.mkdir()

    def start(name: str) -> BaseProcess:
        child = context.Process(target=distill_to_the_end, args=(PARAMS, folders, works[name]))
        child.start()
        return child

    whole = start("whole")
    whole.join(120)
    assert whole.exitcode == 0
    kills, resumed_from = 0, []
    for step in sorted(generator.randrange(NUM_STEPS - 1) for _ in range(NUM_KILLS)):
        child = start("cut")
        kills += _kill_after(child, works["cut"] / "curves.jsonl", step, generator.uniform(0.0, 0.1))
        found = sorted((works["cut"] / "checkpoints").glob("step_*/training.json"))
        resumed_from.append(json.loads(found[-1].read_text())["step"] if found else 0)
    assert kills == NUM_KILLS
    assert len(set(resumed_from)) > NUM_KILLS // 3, "the kills must fall all over the run for this to mean anything"
    last = start("cut")
    last.join(120)
    assert last.exitcode == 0

    weights = [(work / "published/model.safetensors").read_bytes() for work in works.values()]
    assert weights[0] == weights[1]
    curves = [_rows(work / "published/curves.jsonl") for work in works.values()]
    for row in (row for rows in curves for row in rows):
        row.pop("tokens_per_s", None)
        row.pop("mfu", None)
    assert curves[0] == curves[1]
