"""A training on rewards whose servers have a node of their own, as one job of a real Slurm."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from nemo_minitron.launch.slurm.script import SEVERAL_NODES
from tests.conftest import REPO
from tests.support.aligner import require_aligner
from tests.support.processes import MARK, runs_in_a_fork
from tests.support.slurm.cluster import SlurmCluster
from tests.support.slurm.runs import Run

pytestmark = pytest.mark.slurm
TIMEOUT_S, NUM_STEPS = 1200, 24
PROGRAM = "tests.support.slurm.server_nodes"
ACTOR = "actor"
BEFORE = ("teacher", "chat_data")
KEYS = (
    "stages.reinforce.inputs.model=teacher",
    "stages.reinforce.template=chatml",
    f"stages.reinforce.num_steps={NUM_STEPS}",
    "stages.reinforce.prompts_per_step=16",
    "stages.reinforce.global_batch_size=32",
    "stages.reinforce.valid_interval_steps=2",
    "stages.reinforce.num_valid_prompts=16",
    "stages.reinforce.max_new_tokens=12",
    "execution.server_nodes_by_stage={reinforce: 1}",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The stages before the training, run on this machine."""
    require_aligner()
    run = Run(
        tmp_path_factory.mktemp("prepared"),
        None,
        KEYS,
        REPO / "recipes/toy/reinforce.yaml",
        "toy/reinforce",
        ".work/reinforce/training/curves.jsonl",
    )
    for stage in BEFORE:
        run.call("run", f"--until={stage}")
    return run


def copy_of(prepared: Run, root: Path, cluster: SlurmCluster, *overrides: str) -> Run:
    shutil.copytree(prepared.root, root, dirs_exist_ok=True)
    return replace(prepared, root=root, cluster=cluster, overrides=(*KEYS, *overrides))


def started(run: Run) -> str:
    """Launch the training, and return the id of its job once it has done two steps."""
    run.call("launch", "--until=reinforce")
    (job,) = run.job_ids()["reinforce"]
    run.wait_for_step(3, 600)
    return job


def process(run: Run, word: str) -> psutil.Process:
    """Return the process of this run with this word in its command, or its actor."""
    for found in psutil.process_iter():
        try:
            is_wanted = runs_in_a_fork(found) if word == ACTOR else word in " ".join(found.cmdline())
            if is_wanted and str(run.root) in " ".join([*found.cmdline(), *found.environ().values()]):
                return found
        except psutil.Error:
            continue
    raise AssertionError(f"no {word}")


def node_of(found: psutil.Process) -> str:
    """Return what tells nodes apart: their namespace of host names."""
    return os.readlink(f"/proc/{found.pid}/ns/uts")


def require_whole(run: Run, stage: str = "reinforce") -> None:
    """The training has done each step once, and has measured its start once."""
    rows = [json.loads(line) for line in (run.folder / stage / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == list(range(1, NUM_STEPS + 1))
    assert sum(row["step"] == 0 for row in rows) == 1


def test_a_server_on_its_own_node_gives_rewards_to_the_first_node(slurm: SlurmCluster, tmp_path: Path) -> None:
    require_aligner()
    script = tmp_path / "job.sh"
    lines = ["#!/bin/bash", "set -uo pipefail", "restarts=0", 'say() { echo "$1"; }', f"export {MARK}={tmp_path}"]
    lines.append(SEVERAL_NODES.format(first_port=20000, num_ports=12000, server_nodes=1))
    lines.append(f"srun --nodes=2 --ntasks=2 --kill-on-bad-exit=1 {sys.executable} -m {PROGRAM} {tmp_path}")
    script.write_text("\n".join(lines) + "\n")
    log = tmp_path / "log"
    options = ("--nodes=2", "--ntasks-per-node=1", "--mem=4G", f"--output={log}", f"--chdir={REPO}")
    job = slurm.call("sbatch", "--parsable", *options, str(script)).strip()
    slurm.wait_until_idle(TIMEOUT_S)
    assert slurm.job(job)["JobState"] == "COMPLETED", log.read_text()
    found = json.loads(next(line for line in log.read_text().splitlines() if line.startswith("{")))
    assert all(reward > 0 for (reward,) in found["rewards"])
    assert len(found["server_nodes"]) == 1
    assert found["server_nodes"] != [found["own_node"]]


def test_servers_and_actor_are_on_different_nodes_and_survive_a_time_limit(
    slurm: SlurmCluster, prepared: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm)
    job = started(run)
    assert slurm.job(job)["NumNodes"] == "2"
    actor, server, triton = (process(run, word) for word in (ACTOR, "rule_server/task.json", "triton"))
    assert node_of(server) == node_of(triton) != node_of(actor)
    # The signal that Slurm sends before the limit (--signal=B:USR1@...), to the script alone.
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_until_idle(TIMEOUT_S)
    log = run.log("reinforce")
    assert "the time limit is near: requested a checkpoint" in log
    assert "restart 1, reinforce: finished" in log
    require_whole(run)
    assert not list((run.folder / ".work").glob("reinforce/orders/*/secret"))


@pytest.mark.parametrize(
    ("victim", "last_words"), [("rule_server/task.json", "The rule_server ended with code"), (ACTOR, "")]
)
def test_a_server_or_actor_that_dies_ends_the_stage_and_a_second_launch_goes_on(
    victim: str, last_words: str, slurm: SlurmCluster, prepared: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm)
    job = started(run)
    process(run, victim).kill()
    slurm.wait_until_idle(TIMEOUT_S)
    log = run.log("reinforce")
    assert last_words in log
    if last_words:
        assert slurm.job(job)["JobState"] == "FAILED"
        run.call("launch", "--until=reinforce")
        slurm.wait_until_idle(TIMEOUT_S)
    else:
        # Dead processes after a new checkpoint: the job is queued again, as that of any other stage.
        assert "restart 1, reinforce: finished" in log
    require_whole(run)


def test_a_lost_server_node_costs_only_the_steps_since_the_last_checkpoint(
    slurm: SlurmCluster, prepared: Run, tmp_path: Path
) -> None:
    run = copy_of(prepared, tmp_path, slurm)
    job = started(run)
    server = node_of(process(run, "rule_server/task.json"))
    (node,) = [name for name in slurm.node_names if os.readlink(f"/proc/{slurm.daemon_pid(name)}/ns/uts") == server]
    slurm.kill_node(node)
    slurm.start_node(node)
    slurm.wait_until_idle(TIMEOUT_S)
    assert slurm.job(job)["JobState"] == "COMPLETED"
    assert int(slurm.job(job)["Restarts"]) >= 1
    require_whole(run)


def test_rewards_and_critic_of_ppo_have_a_node_each_and_go_on_together(
    slurm: SlurmCluster, prepared: Run, tmp_path: Path
) -> None:
    keys = [word.replace("reinforce", "ppo") for word in KEYS if "batch_size" not in word and "nodes" not in word]
    keys += ["stages.ppo.global_batch_size=16", "execution.server_nodes_by_stage={ppo: 2}"]
    curves = ".work/ppo/training/curves.jsonl"
    run = Run(tmp_path, slurm, tuple(keys), REPO / "recipes/toy/ppo.yaml", "toy/ppo", curves)
    for stage in BEFORE:
        shutil.copytree(prepared.folder / stage, run.folder / stage)
    run.call("launch", "--until=ppo")
    (job,) = run.job_ids()["ppo"]
    run.wait_for_step(3, 600)
    assert slurm.job(job)["NumNodes"] == "3"
    found = [process(run, word) for word in (ACTOR, "rule_server/task.json", "critic/task.json")]
    assert len({node_of(one) for one in found}) == 3
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_until_idle(TIMEOUT_S)
    assert "restart 1, ppo: finished" in run.log("ppo")
    require_whole(run, "ppo")


def test_an_actor_on_two_nodes_has_its_servers_on_a_third(slurm: SlurmCluster, prepared: Run, tmp_path: Path) -> None:
    two = ("execution.parallel_by_stage={reinforce: {dp: 2}}", "cluster.ranks_per_node=1")
    run = copy_of(prepared, tmp_path, slurm, *two, "stages.reinforce.generation_batch_size=8")
    run = replace(run, overrides=tuple(word for word in run.overrides if "server_nodes" not in word))
    job = started(run)
    assert slurm.job(job)["NumNodes"] == "3"
    slurm.wait_until_idle(TIMEOUT_S)
    require_whole(run)
