"""Nodes of a job that run only servers: what the recipe and the script say, and whose requests they serve."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_minitron.errors import EnvironmentProblem, PlanError
from nemo_minitron.processes.nodes import (
    Nodes,
    release_nodes,
    request_server_node,
    serve_requests,
    start_everywhere,
)
from nemo_minitron.processes.same_code import START
from tests.conftest import REPO, Cli
from tests.unit.test_launch import _jobs, _start

REINFORCE, PPO = REPO / "recipes/toy/reinforce.yaml", REPO / "recipes/toy/ppo.yaml"
JOB = {"MINITRON_NODES": "3", "MINITRON_RENDEZVOUS": "node1:20007", "MINITRON_ATTEMPT": "7-0", "SLURM_NODEID": "2"}
WRITE = "import sys; open(sys.argv[1], 'w')"


def layout(stage: str, keys: str) -> str:
    return f"execution.parallel_by_stage={{{stage}: {{{keys}}}}}"


@pytest.mark.parametrize(
    ("recipe", "overrides", "nodes"),
    [
        (REINFORCE, (), (1, 0)),
        (REINFORCE, ("execution.server_nodes_by_stage={reinforce: 1}",), (2, 1)),
        (REINFORCE, (layout("reinforce", "dp: 16"),), (3, 1)),
        (PPO, (layout("ppo", "dp: 16"),), (3, 1)),
        (PPO, (layout("ppo", "dp: 16"), "execution.server_nodes_by_stage={ppo: 2}"), (4, 2)),
    ],
)
def test_a_job_has_the_nodes_of_the_layout_and_those_for_servers(
    recipe: Path, overrides: tuple[str, ...], nodes: tuple[int, int], tmp_path: Path
) -> None:
    jobs = _jobs(recipe, tmp_path, *overrides)
    job = jobs[recipe.stem]
    assert (job.nodes, job.server_nodes) == nodes
    assert jobs["sft"].server_nodes == 0


def test_several_nodes_without_one_for_servers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="take 2 nodes, and its servers need nodes of their own"):
        _jobs(REINFORCE, tmp_path, layout("reinforce", "dp: 16"), "execution.server_nodes_by_stage={reinforce: 0}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{reinforce: 2}", "server_nodes_by_stage.reinforce = 2: the stage has 1 servers"),
        ("{sft: 1}", "server_nodes_by_stage.sft = 1: the stage has 0 servers"),
        ("{reinforse: 1}", "Did you mean reinforce?"),
        ("{reinforce: -1}", "greater than or equal to 0"),
    ],
)
def test_check_names_what_is_wrong(value: str, message: str, minitron: Cli, tmp_path: Path) -> None:
    keys = (f"execution.run_root={tmp_path}", f"execution.server_nodes_by_stage={value}")
    code, output = minitron("check", REINFORCE, *keys)
    assert code == 2, output
    assert message in " ".join(output.split())


def test_the_last_nodes_are_for_servers() -> None:
    nodes = Nodes.here({**JOB, "MINITRON_SERVER_NODES": "1"})
    assert (nodes.count, nodes.servers, nodes.rank) == (2, 1, 2)
    assert "--nnodes=2" in nodes.command("python", 4, ["script"])
    alone = Nodes.here({**JOB, "MINITRON_SERVER_NODES": "2"})
    assert alone.command("python", 4, ["script"])[:4] == ["python", str(START), "ranks", "4"]
    assert Nodes.here({**JOB, "MINITRON_SERVER_NODES": "0"}) == Nodes.here(JOB)


@pytest.mark.parametrize("number", ["3", "-1", "x"])
def test_a_wrong_number_of_server_nodes_is_refused(number: str) -> None:
    with pytest.raises(EnvironmentProblem, match="MINITRON_SERVER_NODES"):
        Nodes.here({**JOB, "MINITRON_SERVER_NODES": number})


def test_a_server_node_serves_only_its_own_requests(tmp_path: Path) -> None:
    first = Nodes(2, 0, "node1", 20001, "7-0", servers=2)
    release_nodes(first, tmp_path)  # each node serves nothing more after the requests that are there
    (tmp_path / "orders/7-0/end").unlink()
    start_everywhere([sys.executable, "-c", WRITE, str(tmp_path / "ranks")], {}, first, tmp_path, _start).wait()
    (tmp_path / "ranks").unlink()
    for rank in (2, 3):
        request_server_node(first, tmp_path, rank, [sys.executable, "-c", WRITE, str(tmp_path / f"server{rank}")])
    server = Nodes(2, 3, "node1", 20001, "7-0", servers=2)
    done = lambda: (tmp_path / "server3").exists()  # noqa: E731
    assert serve_requests(server, tmp_path, done, (tmp_path / "log").open("wb")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"orders", "log", "server3"}
