"""Servers on another node: a process with the variables of that node serves the requests of this one."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nemo_minitron.backends.alignment.base import TaskContext
from nemo_minitron.backends.alignment.nemo_aligner import tunnel
from nemo_minitron.backends.alignment.nemo_aligner.remote_servers import serving
from nemo_minitron.backends.alignment.nemo_aligner.servers import ServerTask
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.processes.nodes import Nodes, release_nodes
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress
from tests.aligner.test_reward_server import ROWS, RULES, ask, server
from tests.conftest import REPO
from tests.support.aligner import require_aligner
from tests.support.processes import MARK, marked

JOB = {
    "MINITRON_NODES": "2",
    "MINITRON_SERVER_NODES": "1",
    "MINITRON_RENDEZVOUS": "localhost:20001",
    "MINITRON_ATTEMPT": "7-0",
}
OTHER_NODE = """
import sys
from pathlib import Path
from nemo_minitron.processes.nodes import Nodes, serve_requests
sys.exit(serve_requests(Nodes.here(), Path(sys.argv[1]), lambda: False, sys.stderr.buffer))
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """The other node; this process is the first one."""
    require_aligner()
    for name, value in {**JOB, "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    own = {**os.environ, "SLURM_NODEID": "1", MARK: str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", OTHER_NODE, str(tmp_path)], cwd=REPO, env=own)
    yield process
    release_nodes(Nodes.here(), tmp_path)
    process.wait(60)
    assert not list(marked(str(tmp_path)))


def context(work: Path) -> TaskContext:
    return TaskContext("rl", work, Parallel(), "cpu", 1, Progress(), StopRequest())


def of_node(work: Path, word: str) -> psutil.Process:
    return next(one for one in marked(str(work)) if any(part.endswith(word) for part in one.cmdline()))


def test_requests_cross_and_nothing_else_listens(node: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with serving([server(tmp_path / "rules", RULES)], context(tmp_path), on_cpu=True) as running:
        folder = Path(running.variables[tunnel.SERVERS_VARIABLE])
        assert stat.S_IMODE((folder / tunnel.SECRET_FILE).stat().st_mode) == 0o600
        requests = [[(row["text"], "a" * 8)] for row in ROWS] + [[("Not a prompt", "a")]]
        found = ask(requests, dict(running.variables))
        assert all(math.isfinite(reward) and reward > 0 for (reward,) in found[:-1])
        assert math.isnan(found[-1][0])
        listening = [
            connection.laddr
            for one in marked(str(tmp_path))
            for connection in one.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert [list(address) for address in listening] == list(
            json.loads((folder / tunnel.ADDRESSES_FILE).read_text()).values()
        )
        running.watch()
    assert not (folder / tunnel.SECRET_FILE).exists()


@pytest.mark.parametrize("victim", ["rule_server/task.json", "tritonserver"])
def test_the_error_of_a_dead_server_reaches_the_first_node(
    victim: str, node: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    reported = pytest.raises(EnvironmentProblem, match="The rule_server ended with code")
    with reported, serving([server(tmp_path / "rule_server", RULES)], context(tmp_path), on_cpu=True):
        of_node(tmp_path, victim).send_signal(signal.SIGKILL)
        # The training fails in the same way when its client does.
        raise EnvironmentProblem("The actor has lost its server.")
    assert node.poll() is None


def test_a_server_that_cannot_start_reports_why(node: subprocess.Popen[bytes], tmp_path: Path) -> None:
    task = server(tmp_path / "rules", RULES)
    broken = ServerTask(task.name, 1, {**task.task, "tokenizer": str(tmp_path / "missing")}, task.work_dir)
    reported = pytest.raises(EnvironmentProblem, match="rule_server ended with code 1")
    with reported, serving([broken], context(tmp_path), on_cpu=True):
        pass


def test_the_servers_end_with_their_node(node: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with serving([server(tmp_path / "rules", RULES)], context(tmp_path), on_cpu=True):
        node.kill()
        left = [one for one in marked(str(tmp_path)) if one.pid != node.pid]
        assert left
        psutil.wait_procs(left, timeout=30)
        assert not [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_several_nodes_need_one_for_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**JOB, "SLURM_NODEID": "0", "MINITRON_SERVER_NODES": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentProblem, match="needs a node for its servers"):
        serving([], context(tmp_path), on_cpu=True)
