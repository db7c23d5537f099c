"""Several nodes on one stage: the first node's runner decides, the others start the same processes beside its own.

The script of a job starts `minitron stage` on every node. On node 0 it runs the stage; whenever that needs a group of
processes, it leaves an order (a JSON file in the stage's work folder, which every node sees), and starts its own part.
The others wait for orders, carry them out, and end when node 0 says so.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.processes.agent import MEETING_VARIABLE, meeting_folder
from nemo_minitron.processes.same_code import START
from nemo_minitron.system.cores import usable_cores
from nemo_minitron.system.files import write_whole
from nemo_minitron.system.interrupts import SIGNALS
from nemo_minitron.system.outer_job import launcher_variables, without_outer_job

RUNNER_VARIABLE = "MINITRON_RUNNER"
"""The process of this node with which its ranks end."""
ORDERS, END, POLL_S, SHUTDOWN_TIMEOUT_S = "orders", "end", 0.2, 40.0
FT_LAUNCHER, FT_RESTARTS = "ft_launcher", 3
"""How often ft_launcher starts the ranks of a node again."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of this job, as its script describes them."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    attempt: str = ""
    """Identifies this start of the job, so that orders left over from an earlier start are ignored."""
    agent: str = "torchrun"

    @staticmethod
    def here(environment: Mapping[str, str] = os.environ) -> Nodes:
        """From MINITRON_NODES, MINITRON_RENDEZVOUS (host:port), MINITRON_ATTEMPT and SLURM_NODEID; one node without.

        Raises:
            EnvironmentProblem: they are not complete.
        """
        agent = environment.get("MINITRON_AGENT", "torchrun")
        said = environment.get("MINITRON_NODES", "1")
        try:
            count = int(said)
            if count < 1:
                raise ValueError("a number of nodes")
            if count == 1:
                return Nodes(agent=agent)
            address, port = environment["MINITRON_RENDEZVOUS"].rsplit(":", 1)
            return Nodes(
                count, int(environment["SLURM_NODEID"]), address, int(port), environment["MINITRON_ATTEMPT"], agent
            )
        except (KeyError, ValueError) as error:
            raise EnvironmentProblem(
                f"MINITRON_NODES = {said}: this, or what goes with it, is not set or no number ({error}).",
                where="MINITRON_NODES, MINITRON_RENDEZVOUS, MINITRON_ATTEMPT, SLURM_NODEID",
                next_step="Start jobs of several nodes with `minitron launch`; its scripts set all of it.",
            ) from None

    def threads_of_each(self, num_processes: int, environment: Mapping[str, str] = os.environ) -> int:
        """CPU threads for each process: OMP_NUM_THREADS, else this job's cores of a node divided by its processes."""
        said = environment.get("OMP_NUM_THREADS", "")
        if said.isdigit() and int(said):
            return int(said)
        return max(1, usable_cores() * self.count // num_processes)

    def command(self, python: Path | str, num_processes: int, script: Sequence[str]) -> list[str]:
        """The words that start this node's part of so many ranks; `{rank}` stands for the rank of the node.

        Args:
            python: runs the ranks, and the agent unless that is a program of its own.
            script: a file or folder for that Python, and its words.

        Raises:
            EnvironmentProblem: the processes cannot be shared out evenly.
        """
        if num_processes % self.count:
            raise EnvironmentProblem(f"{num_processes} processes cannot be shared out over {self.count} nodes.")
        if self.agent != FT_LAUNCHER and self.count == 1:
            return [str(python), str(START), "ranks", str(num_processes), str(python), "-u", *script]
        each = f"--nproc-per-node={num_processes // self.count}"
        if self.agent == FT_LAUNCHER:
            beside = Path(python).with_name(FT_LAUNCHER)
            start = [str(beside) if beside.is_file() else FT_LAUNCHER, f"--max-restarts={FT_RESTARTS}"]
        else:
            start = [str(python), str(START), "torch.distributed.run"]
        port = self.port or free_port()
        # A static rendezvous: the other one keeps its state as a pickle in a store that everybody can reach.
        where = ["--rdzv-backend=static", f"--nnodes={self.count}", "--node-rank={rank}"]
        return [*start, *where, f"--master-addr={self.address}", f"--master-port={port}", each, *script]

    @contextmanager
    def meeting(self) -> Iterator[dict[str, str]]:
        """What ranks of one node need in their environment to find each other; those of several ask the first node."""
        if self.count > 1:
            yield {}
            return
        with meeting_folder() as variables:
            # ft_launcher takes pickles from sockets with names that can be foretold, in the folder for temporary files.
            own = {"TMPDIR": variables[MEETING_VARIABLE]} if self.agent == FT_LAUNCHER else {}
            yield {**variables, **own}


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_everywhere(
    command: Sequence[str],
    environment: Mapping[str, str],
    nodes: Nodes,
    work: Path,
    start: Callable[[list[str], dict[str, str]], subprocess.Popen[bytes]],
    *,
    outside_job: bool = False,
) -> subprocess.Popen[bytes]:
    """Leave the order for the other nodes, and start this node's part.

    Args:
        command: with `{rank}` in the words that name the node.
        environment: what is set besides the node's own.
        work: the stage's work folder.
        outside_job: hide Slurm's variables from the processes.
    """
    if nodes.count > 1:
        folder = _folder(work, nodes)
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.json")))
        order = {"command": list(command), "environment": dict(environment), "outside_job": outside_job}
        write_whole(folder / f"{number}.json", json.dumps(order))
    return start(_for_node(command, 0), _own_environment(environment, nodes, outside_job=outside_job))


def _own_environment(environment: Mapping[str, str], nodes: Nodes, *, outside_job: bool) -> dict[str, str]:
    """This node's environment with what an order sets; without the ranks of another launcher."""
    own = without_outer_job(os.environ) if outside_job else {**os.environ}
    for name in launcher_variables(own):
        del own[name]
    return {**own, **gloo_interface(nodes, own), **environment, RUNNER_VARIABLE: str(os.getpid())}


def gloo_interface(nodes: Nodes, environment: Mapping[str, str]) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME where this node's own name stands for the loopback, which gloo would offer to other nodes.

    Debian writes `127.0.1.1 NAME` into /etc/hosts. Empty for one node, and where the name or the user says it right.
    """
    if nodes.count == 1 or "GLOO_SOCKET_IFNAME" in environment:
        return {}
    own, first = _address_of(socket.gethostname()), _address_of(nodes.address)
    is_wrong = own.startswith("127.") and (own != "127.0.0.1" or not first.startswith("127."))
    interface = _default_interface() if is_wrong else None
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _default_interface() -> str | None:
    """The network interface of the default route."""
    try:
        rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    except OSError:
        return None
    return next((row[0] for row in rows if len(row) > 1 and row[1] == "00000000"), None)


def dismiss(nodes: Nodes, work: Path) -> None:
    """The stage is over: the other nodes may go."""
    if nodes.count > 1:
        folder = _folder(work, nodes)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / END).touch()


def follow(nodes: Nodes, work: Path, is_published: Callable[[], bool], output: IO[bytes]) -> int:
    """What a node other than the first does: 0 when dismissed, else the code of the processes that failed."""
    folder, number = _folder(work, nodes), 0
    while not (folder / END).is_file() and not is_published():
        order = folder / f"{number}.json"
        if not order.is_file():
            time.sleep(POLL_S)
            continue
        number += 1
        code = _carry_out(json.loads(order.read_text()), nodes, output)
        if code:
            return code
    return 0


def deaf_to_stops(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Start a child that ignores the signals that ask for a stop: ignored ones stay ignored in a child."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS.values()}
    try:
        return start()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _carry_out(order: Mapping[str, object], nodes: Nodes, output: IO[bytes]) -> int:
    command, environment = order["command"], order["environment"]
    assert isinstance(command, list)
    assert isinstance(environment, dict)
    own = _own_environment(environment, nodes, outside_job=bool(order.get("outside_job")))
    process = deaf_to_stops(
        lambda: subprocess.Popen(_for_node(command, nodes.rank), env=own, stdout=output, stderr=output),
    )
    try:
        return process.wait()
    except BaseException:
        end_agent(process)
        raise


def end_agent(process: subprocess.Popen[bytes]) -> None:
    """An agent ends its ranks on SIGINT; killed outright it would leave them behind."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SHUTDOWN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _for_node(command: Sequence[str], rank: int) -> list[str]:
    return [f"--node-rank={rank}" if word == "--node-rank={rank}" else word for word in command]


def _folder(work: Path, nodes: Nodes) -> Path:
    return work / ORDERS / nodes.attempt
