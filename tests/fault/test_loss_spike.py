"""A training with a loss spike stops, keeps the checkpoint from before it, and resumes with other keys."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

from nemo_minitron.backends.megatron.training.checkpoint import checkpoints
from tests.support.processes import output_of, start_run, wait_for_step

STEPS = ("stages.distill.num_steps=40", "stages.distill.save_interval_steps=2", "stages.distill.keep_checkpoints=3")
ABSURD = ("stages.distill.lr=50", "stages.distill.warmup_steps=1")
RUN = "toy/width"


def test_a_training_stops_at_a_loss_spike_and_resumes_before_it_with_a_lower_rate(tmp_path: Path) -> None:
    work = tmp_path / RUN / ".work/distill"
    first = start_run(tmp_path, *STEPS)
    wait_for_step(work / "curves.jsonl", 14, first)
    first.send_signal(signal.SIGTERM)
    found = re.search(r"stopped after step (\d+)", output_of(first))
    assert found
    first_stop = int(found[1])

    spike = start_run(tmp_path, *STEPS, *ABSURD, "--accept-drift")
    output = output_of(spike)
    assert spike.returncode == 2, output
    assert "Traceback" not in output
    assert "resumes work that was started with other keys" in output
    assert f"distill {first_stop}/40" in output
    found = re.search(
        r"loss (\S+) at step (\d+): 3 steps in a row above 3 times the median \(median of .*: (\S+)\)", output
    )
    assert found, output
    loss, stopped, usual = float(found[1]), int(found[2]), float(found[3])
    assert loss > 3 * usual
    newest = checkpoints(work / "checkpoints")[-1]
    step = int(newest.name.removeprefix("step_"))
    assert first_stop <= step <= stopped - 3, "no checkpoint may be from the spike"
    assert str(newest) in output
    assert f"With --accept-drift it resumes from step {step}" in output

    last = start_run(tmp_path, *STEPS, "--accept-drift")
    output = output_of(last)
    assert last.returncode == 0, output
    assert f"distill {step}/40" in output
    folder = tmp_path / RUN / "distill"
    rows = [json.loads(line) for line in (folder / "curves.jsonl").open()]
    losses = {row["step"]: row["train_loss"] for row in rows if "train_loss" in row}
    assert sorted(losses) == list(range(1, 41))
    assert max(losses.values()) < 3 * usual, "the curve must not contain the steps that were undone"
    accepted = json.loads((folder / "manifest.json").read_text())["provenance"]["accepted_work"]
    assert [any(change.startswith("lr: ") for change in each["changed"]) for each in accepted] == [True, True]


def test_a_training_with_another_rate_starts_again_without_accept_drift(tmp_path: Path) -> None:
    work = tmp_path / RUN / ".work/distill"
    first = start_run(tmp_path, *STEPS)
    wait_for_step(work / "curves.jsonl", 5, first)
    first.send_signal(signal.SIGTERM)
    output_of(first)
    again = start_run(tmp_path, *STEPS, "stages.distill.lr=1e-3")
    output = output_of(again)
    assert again.returncode == 0, output
    assert "starts again, because its keys have changed (lr: 0.002 -> 0.001); --accept-drift would resume" in output
    assert "distill 0/40" in output
    assert list((tmp_path / RUN / ".superseded").glob("work-distill-*/checkpoints/step_*"))


def test_another_loss_guard_does_not_change_the_stage(tmp_path: Path) -> None:
    work = tmp_path / RUN / ".work/distill"
    first = start_run(tmp_path, *STEPS)
    wait_for_step(work / "curves.jsonl", 5, first)
    first.send_signal(signal.SIGTERM)
    found = re.search(r"stopped after step (\d+)", output_of(first))
    assert found
    again = start_run(tmp_path, *STEPS, "stages.distill.guard=null")
    output = output_of(again)
    assert again.returncode == 0, output
    assert f"distill {found[1]}/40" in output
