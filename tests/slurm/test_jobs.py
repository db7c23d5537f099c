"""Jobs of a real Slurm: the whole chain, preemption, time limits and lost nodes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.slurm.cluster import SlurmCluster
from tests.support.slurm.runs import TWO_NODES, Run, copy_of

pytestmark = pytest.mark.slurm
TIMEOUT_S = 900
TIME_LIMIT_S = 120


def test_the_whole_recipe_runs_as_jobs_and_is_not_submitted_twice(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = Run(tmp_path, slurm, ("stages.distill.num_steps=6", "stages.distill.warmup_steps=1"))
    assert "Slurm answers; partitions: main, short" in run.call("check", "--cluster")
    output = run.call("launch")
    assert "submitted" in output
    assert "Jobs of this run are still there" in run.call("launch", code=2)
    slurm.wait_until_idle(TIMEOUT_S)
    assert (run.folder / "report.html").is_file()
    assert "all stages have finished" in run.call("launch")
    states = {slurm.job(ids[0])["JobState"] for ids in run.job_ids().values()}
    assert states == {"COMPLETED"}


def test_a_failing_stage_cancels_dependent_jobs_and_a_second_launch_continues(
    slurm: SlurmCluster, prepared: Run, undisturbed: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm)
    weights = run.folder / "prune/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    run.call("launch", "--until=evaluate_distilled")
    slurm.wait_until_idle(TIMEOUT_S)
    first = {name: slurm.job(ids[0])["JobState"] for name, ids in run.job_ids().items()}
    assert first == {"distill": "FAILED", "evaluate_distilled": "CANCELLED"}
    assert "damaged" in run.call("logs", "distill")
    assert "not retried" not in run.log("distill")
    weights.write_bytes(whole)
    run.call("launch", "--until=evaluate_distilled")
    slurm.wait_until_idle(TIMEOUT_S)
    second = {name: slurm.job(ids[0])["JobState"] for name, ids in run.job_ids(2).items()}
    assert second == {"distill": "COMPLETED", "evaluate_distilled": "COMPLETED"}
    assert run.weights() == undisturbed.weights()


def test_a_job_at_its_time_limit_saves_is_requeued_and_gives_the_same_result(
    slurm: SlurmCluster, prepared: Run, undisturbed: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm)
    run.call("launch", "--until=distill")
    (job,) = run.job_ids()["distill"]
    run.wait_for_step(3)
    # The signal that Slurm sends before the limit (--signal=B:USR1@...), to the script only.
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_until_idle(TIMEOUT_S)
    log = run.log("distill")
    assert "the time limit is near: requested a checkpoint" in log
    assert "distill stopped after step" in log
    assert "restart 1, distill: finished" in log
    assert slurm.job(job)["Restarts"] == "1"
    assert run.weights() == undisturbed.weights()


def test_a_stage_survives_slurms_own_time_limit(
    slurm: SlurmCluster, prepared: Run, undisturbed: Run, tmp_path: Path
) -> None:
    # More steps than fit into the limit; Slurm's signal comes up to a minute before the requested 20 seconds.
    steps = int(TIME_LIMIT_S * 1.2 / undisturbed.seconds_per_step())
    keys = (f"stages.distill.num_steps={steps}", f"stages.distill.save_interval_steps={steps}")
    alone = copy_of(prepared, tmp_path / "alone", None, *keys)
    alone.call("run", "--until=distill")
    run = copy_of(
        prepared, tmp_path / "jobs", slurm, *keys, f"cluster.time_min={TIME_LIMIT_S // 60}", "cluster.grace_s=20"
    )
    run.call("launch", "--until=distill")
    (job,) = run.job_ids()["distill"]
    slurm.wait_until_idle(TIMEOUT_S)
    assert slurm.job(job)["JobState"] == "COMPLETED"
    assert int(slurm.job(job)["Restarts"]) >= 1
    assert "the time limit is near: requested a checkpoint" in run.log("distill")
    assert run.weights() == alone.weights()


def test_a_lost_node_costs_only_the_steps_since_the_last_checkpoint(
    slurm: SlurmCluster, prepared: Run, undisturbed: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm)
    run.call("launch", "--until=distill")
    (job,) = run.job_ids()["distill"]
    run.wait_for_step(12)
    node = slurm.job(job)["NodeList"]
    slurm.kill_node(node)
    slurm.start_node(node)
    slurm.wait_until_idle(TIMEOUT_S)
    assert slurm.job(job)["JobState"] == "COMPLETED"
    assert int(slurm.job(job)["Restarts"]) >= 1
    steps = [json.loads(line)["step"] for line in (run.folder / "distill/curves.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert run.weights() == undisturbed.weights()


def test_two_nodes_with_two_ranks_each_train_together_and_survive_a_stop(
    slurm: SlurmCluster, prepared: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    alone = copy_of(prepared, tmp_path_factory.mktemp("alone"), None, TWO_NODES)
    alone.call("run", "--until=distill")
    run = copy_of(prepared, tmp_path_factory.mktemp("nodes"), slurm, TWO_NODES)
    run.call("launch", "--until=distill")
    (job,) = run.job_ids()["distill"]
    run.wait_for_step(3)
    facts = slurm.job(job)
    assert facts["NumNodes"] == "2"
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_until_idle(TIMEOUT_S)
    assert "restart 1, distill: finished" in run.log("distill")
    assert run.weights() == alone.weights()


def test_jobs_continue_while_the_controller_restarts(
    slurm: SlurmCluster, prepared: Run, undisturbed: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm)
    run.call("launch", "--until=evaluate_distilled")
    run.wait_for_step(3)
    slurm.stop_controller()
    time.sleep(2)
    slurm.start_controller()
    slurm.wait_until_idle(TIMEOUT_S)
    assert (run.folder / "evaluate_distilled/manifest.json").is_file()
    assert run.weights() == undisturbed.weights()


def test_a_site_without_requeue_gets_a_chain_of_links(
    slurm: SlurmCluster, prepared: Run, undisturbed: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm, "cluster.requeue=false", "cluster.links=3")
    run.call("launch", "--until=evaluate_distilled")
    links = run.job_ids()["distill"]
    assert len(links) == 3
    run.wait_for_step(3)
    slurm.call("scancel", "--batch", "--signal=USR1", links[0])
    slurm.wait_until_idle(TIMEOUT_S)
    assert [slurm.job(link)["JobState"] for link in links] == ["COMPLETED"] * 3
    log = run.log("distill")
    assert "continues in the next link of its chain" in log
    assert "has already finished" in log
    assert (run.folder / "evaluate_distilled/manifest.json").is_file()
    assert run.weights() == undisturbed.weights()


def test_a_stage_without_progress_is_not_requeued_forever(slurm: SlurmCluster, prepared: Run, tmp_path: Path) -> None:
    run = copy_of(prepared, tmp_path, slurm, "stages.distill.save_interval_steps=100000")
    run.call("launch", "--until=distill")
    (job,) = run.job_ids()["distill"]
    run.wait_for_step(3)
    # Kill all processes at once, as the out-of-memory killer does: nothing can be saved.
    slurm.call("scancel", "--signal=KILL", f"{job}.0")
    slurm.wait_until_idle(TIMEOUT_S)
    assert slurm.job(job)["JobState"] == "FAILED"
    assert slurm.job(job)["Restarts"] == "0"
    assert "has saved nothing new in this job: not retried" in run.log("distill")


def test_cancel_ends_the_jobs_and_launch_continues_from_their_checkpoint(
    slurm: SlurmCluster, prepared: Run, undisturbed: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm)
    run.call("launch", "--until=distill")
    (job,) = run.job_ids()["distill"]
    run.wait_for_step(7)
    assert f"canceled {job}" in run.call("cancel")
    slurm.wait_until_idle(TIMEOUT_S)
    assert slurm.job(job)["JobState"] == "CANCELLED"
    run.call("launch", "--until=distill")
    slurm.wait_until_idle(TIMEOUT_S)
    assert run.weights() == undisturbed.weights()
