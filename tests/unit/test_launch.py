"""Resources that each stage requests, nodes that work together, and the output of sinfo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan, load_recipe
from nemo_minitron.errors import ConfigError, EnvironmentProblem, PlanError
from nemo_minitron.launch.context import cluster_of
from nemo_minitron.launch.jobs import Job, jobs_of
from nemo_minitron.launch.slurm.answers import minutes_of, partitions
from nemo_minitron.processes.nodes import Nodes, release_nodes, serve_requests, start_everywhere
from nemo_minitron.processes.same_code import START
from nemo_minitron.schema.cluster import Cluster, Container
from tests.conftest import REPO, TOY

ALIGNED = REPO / "recipes/toy/aligned.yaml"
SEARCH = REPO / "recipes/toy/search.yaml"


def _jobs(recipe: Path, tmp_path: Path, *overrides: str) -> dict[str, Job]:
    keys = [f"execution.run_root={tmp_path}", "cluster=slurm", "execution.device=auto", *overrides]
    plan = load_plan(recipe, keys, checked=False)
    cluster = cluster_of(plan.recipe)
    return {job.name: job for job in jobs_of(plan, cluster, {call.name for call in plan.calls})}


def test_a_layout_decides_nodes_and_gpus(tmp_path: Path) -> None:
    layout = "execution.parallel_by_stage={distill: {tp: 2, dp: 16}, score: {dp: 3}}"
    jobs = _jobs(TOY, tmp_path, layout, "cluster.exclusive=false")
    assert (jobs["distill"].nodes, jobs["distill"].processes_per_node, jobs["distill"].resources.gpus_per_node) == (
        4,
        8,
        8,
    )
    assert (jobs["score"].nodes, jobs["score"].resources.gpus_per_node) == (1, 3)
    assert (jobs["select"].nodes, jobs["select"].resources.gpus_per_node) == (1, 0)
    assert jobs["speed"].resources.gpus_per_node == 1
    assert _jobs(TOY, tmp_path)["score"].resources.gpus_per_node == 8, "whole nodes: all their GPUs"


def test_nodes_that_cannot_be_filled_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="12 processes, and a node takes 8"):
        _jobs(TOY, tmp_path, "execution.parallel_by_stage={distill: {dp: 12}}")


def test_a_stage_waits_for_what_it_reads_and_not_for_more(tmp_path: Path) -> None:
    jobs = _jobs(TOY, tmp_path)
    assert jobs["prune_random"].after == ("teacher", "select_random")
    assert set(jobs["distill"].after) >= {"prune", "data"}
    assert "evaluate_random" not in jobs["distill"].after
    order = list(jobs)
    assert all(order.index(other) < order.index(name) for name, job in jobs.items() for other in job.after)


def test_candidates_of_a_rung_are_one_array(tmp_path: Path) -> None:
    jobs = _jobs(SEARCH, tmp_path)
    arrays = [job for job in jobs.values() if job.is_array]
    assert arrays
    assert all(job.name.split("_rung")[0] == "search" for job in arrays)


def test_candidates_have_the_layout_and_resources_of_their_search(tmp_path: Path) -> None:
    keys = [
        "execution.parallel_by_stage={search: {dp: 16}, search_r2_p1: {dp: 32}}",
        "cluster.by_stage={search: {time_min: 77}, search_l4_h64_f96: {partition: big}}",
    ]
    jobs = _jobs(SEARCH, tmp_path, *keys)
    requested = {name: (job.nodes, job.resources.time_min, job.resources.partition) for name, job in jobs.items()}
    assert requested["search_rung1"] == requested["search_rung2"] == (2, 77, None)
    assert requested["search_l4_h64_f96"] == (2, 77, "big")
    assert requested["search_r2_p1"] == (4, 77, None)
    assert (len(jobs["search_rung1"].stages), len(jobs["search_rung2"].stages)) == (6, 2)
    assert set(jobs["search_r2_p1"].after) >= {"search_rung1", "search_l4_h64_f96"}
    assert requested["score"][0] == 1


def test_stages_of_nemo_aligner_get_its_image(tmp_path: Path) -> None:
    environments = {name: job.environment for name, job in _jobs(ALIGNED, tmp_path).items()}
    assert environments["sft"] == environments["dpo"] == "aligner"
    assert environments["distill"] == environments["evaluate_dpo"] == "core"


def test_keys_for_one_stage_win_over_those_for_its_kind_over_the_clusters(tmp_path: Path) -> None:
    keys = ["cluster.partition=gpu", "cluster.cpu={partition: cpu, time_min: 30}", "cluster.time_min=600"]
    jobs = _jobs(TOY, tmp_path, *keys, "cluster.by_stage={select: {time_min: 5}, distill: {partition: big}}")
    requested = {name: (job.resources.partition, job.resources.time_min) for name, job in jobs.items()}
    assert requested["score"] == ("gpu", 600)
    assert requested["distill"] == ("big", 600)
    assert requested["prune"] == ("cpu", 30)
    assert requested["select"] == ("cpu", 5)
    with pytest.raises(PlanError, match="by_stage has dstill"):
        _jobs(TOY, tmp_path, "cluster.by_stage={dstill: {time_min: 5}}")


def test_a_cluster_is_a_file_by_name_or_by_path(tmp_path: Path) -> None:
    own = tmp_path / "our site.yaml"
    own.write_text("partition: ours\ngpus_per_node: 4\n")
    plan = load_plan(TOY, [f"cluster={own}", "cluster.gpus_per_node=2", "launcher=slurm"])
    assert plan.recipe.execution.cluster == Cluster(partition="ours", gpus_per_node=2)
    assert plan.recipe.execution.launcher == "slurm"
    with pytest.raises(ConfigError, match="There is no cluster slrum"):
        load_plan(TOY, ["cluster=slrum"])
    own.write_text("partion: ours\n")
    with pytest.raises(ConfigError, match="partion"):
        load_plan(TOY, [f"cluster={own}"])


def test_a_named_cluster_replaces_keys_of_the_recipe_and_overrides_replace_both(tmp_path: Path) -> None:
    recipe, site = tmp_path / "own.yaml", tmp_path / "site.yaml"
    recipe.write_text(
        "defaults: [toy/width, _self_]\n"
        "execution: {cluster: {account: me, partition: old, gpus_per_node: 2, container: {runtime: pyxis}}}\n"
    )
    site.write_text("partition: new\nqos: ${partition}_${.partition}\ngpus_per_node: 4\ncontainer: {runtime: docker}\n")
    changes = ["cluster.gpus_per_node=1", f"cluster={site}", "~cluster.account"]
    cluster = load_recipe(recipe, changes[:-1]).execution.cluster
    assert cluster == Cluster(
        account="me", partition="new", qos="new_new", gpus_per_node=1, container=Container(runtime="docker")
    )
    assert cluster is not None
    assert load_recipe(recipe, changes).execution.cluster == cluster.model_copy(update={"account": None})


@pytest.mark.parametrize(
    ("written", "override", "key"),
    [
        ("execution:", None, "execution"),
        ("execution: laptop", None, "execution"),
        ("execution: {cluster: slurm}", None, "execution.cluster"),
        ("execution: {cluster: [slurm]}", None, "execution.cluster"),
        ("", "execution.cluster=slurm", "execution.cluster"),
    ],
)
def test_a_cluster_beside_a_value_that_is_no_mapping_is_a_message(
    written: str, override: str | None, key: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"defaults: [toy/width, _self_]\n{written}\n")
    with pytest.raises(ConfigError, match=rf"- {key}: input should be a valid dictionary"):
        load_plan(recipe, [*([override] if override else []), "cluster=slurm"])


@pytest.mark.parametrize("stages", ["5", "[1, 2]"])
def test_an_unknown_override_of_a_recipe_without_stages_is_a_message(stages: str, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"stages: {stages}\n")
    with pytest.raises(ConfigError, match="could not be composed"):
        load_plan(recipe, ["nosuch.key=1"])


def test_the_output_of_sinfo_is_parsed() -> None:
    found = partitions(
        "batch|up|4:00:00|gpu:a100:8(S:0-1)|30\nbatch|up|4:00:00|gpu:4|2\ndebug|down|infinite|(null)|1\n"
    )
    assert (found["batch"].gpus, found["batch"].limit_min, found["batch"].nodes) == (8, 240, 32)
    assert (found["debug"].is_up, found["debug"].limit_min, found["debug"].gpus) == (False, None, 0)
    assert [minutes_of(text) for text in ("30:00", "1-12:30:00", "2-0")] == [30, 2190, 2880]


OTHER_NODE = """
import sys
from pathlib import Path
from nemo_minitron.processes.nodes import Nodes, serve_requests
sys.exit(serve_requests(Nodes(2, 1, "node1", 20001, "7-0"), Path(sys.argv[1]), lambda: False, sys.stderr.buffer))
"""


def _start(words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, env=environment)


def test_other_nodes_serve_requests_until_they_are_released(tmp_path: Path) -> None:
    first = Nodes(2, 0, "node1", 20001, "7-0")
    write = "import sys, os; open(sys.argv[1] + os.environ['WORD'] + sys.argv[2][-1], 'w')"
    other = subprocess.Popen([sys.executable, "-c", OTHER_NODE, str(tmp_path)], cwd=REPO)
    for word in ("a", "b"):
        command = [sys.executable, "-c", write, f"{tmp_path}/", "--node-rank={rank}"]
        assert start_everywhere(command, {"WORD": word}, first, tmp_path, _start).wait() == 0
    release_nodes(first, tmp_path)
    assert other.wait(60) == 0
    assert {"a0", "b0"} <= {path.name for path in tmp_path.iterdir()}
    requests = sorted((tmp_path / "orders/7-0").glob("*.json"))
    assert [json.loads(file.read_text())["environment"]["WORD"] for file in requests] == ["a", "b"]


def test_a_node_returns_the_exit_code_of_its_failed_processes(tmp_path: Path) -> None:
    first, second = (Nodes(2, rank, "node1", 20001, "7-1") for rank in (0, 1))
    start_everywhere([sys.executable, "-c", "raise SystemExit(3)"], {}, first, tmp_path, _start).wait()
    assert serve_requests(second, tmp_path, lambda: False, (tmp_path / "log").open("wb")) == 3


def test_requests_of_an_earlier_attempt_are_ignored(tmp_path: Path) -> None:
    start_everywhere(
        [sys.executable, "-c", "raise SystemExit(3)"], {}, Nodes(2, 0, "a", 1, "7-0"), tmp_path, _start
    ).wait()
    later = Nodes(2, 1, "a", 1, "7-1")
    release_nodes(later, tmp_path)
    assert serve_requests(later, tmp_path, lambda: False, (tmp_path / "log").open("wb")) == 0


def test_the_agent_of_several_nodes(tmp_path: Path) -> None:
    several = {
        "MINITRON_NODES": "2",
        "MINITRON_RENDEZVOUS": "node1:20007",
        "MINITRON_ATTEMPT": "7-0",
        "SLURM_NODEID": "1",
    }
    nodes = Nodes.here(several)
    words = nodes.command("python", 4, ["script"])
    # `-m` would put the working directory first on the import path.
    assert words[:3] == ["python", str(START), "torch.distributed.run"]
    assert words[3:] == [
        "--rdzv-backend=static",
        "--nnodes=2",
        "--node-rank={rank}",
        "--master-addr=node1",
        "--master-port=20007",
        "--nproc-per-node=2",
        "script",
    ]
    with pytest.raises(EnvironmentProblem, match="3 processes cannot be distributed evenly over 2 nodes"):
        nodes.command("python", 3, ["script"])
    with pytest.raises(EnvironmentProblem, match="MINITRON_NODES = 2"):
        Nodes.here({"MINITRON_NODES": "2"})


def test_the_agent_of_one_node_opens_no_port_and_ft_launcher_uses_the_loopback(tmp_path: Path) -> None:
    words = Nodes.here({}).command("python", 4, ["script", "word"])
    assert words == ["python", str(START), "ranks", "4", "python", "-u", "script", "word"]
    words = Nodes.here({"MINITRON_AGENT": "ft_launcher"}).command(tmp_path / "python", 2, ["script"])
    assert words[0] == "ft_launcher"
    assert {"--rdzv-backend=static", "--nnodes=1", "--master-addr=127.0.0.1"} <= set(words)
    assert "--standalone" not in words


def test_threads_are_omp_num_threads_or_an_equal_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_minitron.processes.nodes.usable_cores", lambda: 16)
    assert Nodes().threads_of_each(1, {}) == 16
    assert Nodes().threads_of_each(8, {"OMP_NUM_THREADS": ""}) == 2
    assert Nodes(count=2).threads_of_each(8, {}) == 4  # four of them on each node
    assert Nodes().threads_of_each(64, {}) == 1
    assert Nodes().threads_of_each(1, {"OMP_NUM_THREADS": "3"}) == 3
