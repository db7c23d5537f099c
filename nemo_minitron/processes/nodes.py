"""Execution of a stage on several nodes: the runner on node 0 controls the processes on all nodes.

The script of a job starts `minitron stage` on every node. Node 0 runs the stage. When the stage needs a group of
processes, node 0 writes a request (a JSON file in the stage's work folder, on a file system that all nodes share) and
starts its own part of the processes. The other nodes wait for requests, start their parts, and exit when node 0
releases them.

The last nodes of a job may be reserved for servers that the processes call. Such a node gets requests of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.processes.agent import RENDEZVOUS_VARIABLE, rendezvous_folder
from nemo_minitron.processes.same_code import START
from nemo_minitron.system.cores import usable_cores
from nemo_minitron.system.files import write_whole
from nemo_minitron.system.interrupts import SIGNALS, is_main_thread
from nemo_minitron.system.outer_job import launcher_variables, without_outer_job

RUNNER_VARIABLE = "MINITRON_RUNNER"
"""Environment variable with the id of the process whose end also ends the ranks of this node."""
REQUESTS, END, POLL_S, SHUTDOWN_TIMEOUT_S = "orders", "end", 0.2, 40.0
REQUEST_FILES = "[0-9]*.json"
FT_LAUNCHER, FT_RESTARTS = "ft_launcher", 3
"""Name of the launcher with fault tolerance, and how often it restarts the ranks of a node."""
PORTS, ATTEMPTS_TO_FIND_A_PORT = range(20000, 32000), 100
"""Ports for a rendezvous: below Linux's ephemeral range, and above most services. The id of a Slurm job chooses one."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of this job, as described by its script."""

    count: int = 1
    """Nodes that run the processes of a stage."""
    rank: int = 0
    """Rank of this node; the nodes for servers have the last ones."""
    address: str = "127.0.0.1"
    port: int = 0
    attempt: str = ""
    """Identifier of this start of the job, so that requests left over from an earlier start are ignored."""
    agent: str = "torchrun"
    servers: int = 0
    """Further nodes, which run only servers."""

    @staticmethod
    def here(environment: Mapping[str, str] = os.environ) -> Nodes:
        """Read MINITRON_NODES (all nodes), MINITRON_SERVER_NODES (those for servers), MINITRON_RENDEZVOUS (host:port),
        MINITRON_ATTEMPT and SLURM_NODEID; default: one node.

        Raises:
            EnvironmentProblem: a variable is missing or invalid.
        """
        agent = environment.get("MINITRON_AGENT", "torchrun")
        num_nodes = environment.get("MINITRON_NODES", "1")
        try:
            total, servers = int(num_nodes), int(environment.get("MINITRON_SERVER_NODES", "0"))
            if not 0 <= servers < total:
                raise ValueError("a number of nodes")
            if total == 1:
                return Nodes(agent=agent)
            address, port = environment["MINITRON_RENDEZVOUS"].rsplit(":", 1)
            rank, attempt = int(environment["SLURM_NODEID"]), environment["MINITRON_ATTEMPT"]
            return Nodes(total - servers, rank, address, int(port), attempt, agent, servers)
        except (KeyError, ValueError) as error:
            raise EnvironmentProblem(
                f"MINITRON_NODES = {num_nodes}: it or a variable that belongs to it is missing or invalid ({error}).",
                where="MINITRON_NODES, MINITRON_SERVER_NODES, MINITRON_RENDEZVOUS, MINITRON_ATTEMPT, SLURM_NODEID",
                next_step="Start jobs on several nodes with `minitron launch`; its scripts set all these variables.",
            ) from None

    def threads_of_each(self, num_processes: int, environment: Mapping[str, str] = os.environ) -> int:
        """Return the CPU threads per process: OMP_NUM_THREADS, else the usable cores divided by a node's processes."""
        value = environment.get("OMP_NUM_THREADS", "")
        if value.isdigit() and int(value):
            return int(value)
        return max(1, usable_cores() * self.count // num_processes)

    def command(self, python: Path | str, num_processes: int, script: Sequence[str]) -> list[str]:
        """Return the command that starts a node's part of the ranks; `{rank}` stands for the rank of the node.

        Args:
            python: Python for the ranks, and for the agent unless that is a separate program.
            num_processes: number of ranks on all nodes together.
            script: a file or folder for that Python, and its arguments.

        Raises:
            EnvironmentProblem: the ranks cannot be distributed evenly.
        """
        if num_processes % self.count:
            raise EnvironmentProblem(f"{num_processes} processes cannot be distributed evenly over {self.count} nodes.")
        if self.agent != FT_LAUNCHER and self.count == 1:
            return [str(python), str(START), "ranks", str(num_processes), str(python), "-u", *script]
        each = f"--nproc-per-node={num_processes // self.count}"
        if self.agent == FT_LAUNCHER:
            beside = Path(python).with_name(FT_LAUNCHER)
            start = [str(beside) if beside.is_file() else FT_LAUNCHER, f"--max-restarts={FT_RESTARTS}"]
        else:
            start = [str(python), str(START), "torch.distributed.run"]
        address, port = (self.address, self.port) if self.count > 1 else ("127.0.0.1", free_port())
        # Use the static rendezvous: the c10d one keeps its state as a pickle in a store that any user can access.
        where = ["--rdzv-backend=static", f"--nnodes={self.count}", "--node-rank={rank}"]
        return [*start, *where, f"--master-addr={address}", f"--master-port={port}", each, *script]

    @contextmanager
    def rendezvous(self) -> Iterator[dict[str, str]]:
        """Yield the environment variables for the rendezvous of ranks on one node; none for several nodes."""
        if self.count > 1:
            yield {}
            return
        with rendezvous_folder() as variables:
            # ft_launcher reads pickles from sockets with predictable names in TMPDIR, so use the protected folder.
            own = {"TMPDIR": variables[RENDEZVOUS_VARIABLE]} if self.agent == FT_LAUNCHER else {}
            yield {**variables, **own}


def free_port() -> int:
    """Return an unused port of the loopback interface.

    Its user opens it seconds later. The system gives the ports of the ephemeral range (from 32768 on Linux) to other
    processes at any time, so choose one below it.

    Raises:
        EnvironmentProblem: no port is free.
    """
    for port in random.SystemRandom().sample(PORTS, ATTEMPTS_TO_FIND_A_PORT):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise EnvironmentProblem(
        f"None of {ATTEMPTS_TO_FIND_A_PORT} ports tried from {PORTS.start} to {PORTS[-1]} is free."
    )


def start_everywhere(
    command: Sequence[str],
    environment: Mapping[str, str],
    nodes: Nodes,
    work: Path,
    start: Callable[[list[str], dict[str, str]], subprocess.Popen[bytes]],
    *,
    outside_job: bool = False,
) -> subprocess.Popen[bytes]:
    """Write the request for the other nodes, and start the processes of this node.

    Args:
        command: the command, with `{rank}` in place of the node's rank.
        environment: variables to set in addition to the environment of each node.
        work: work folder of the stage.
        start: function that starts the command with an environment.
        outside_job: whether to hide Slurm's variables and its SIGTERM from the processes.
    """
    if nodes.count > 1:
        _request(requests_folder(work, nodes), command, environment, outside_job=outside_job)
    with shielded() if outside_job else nullcontext():
        return start(_for_node(command, 0), _own_environment(environment, nodes, outside_job=outside_job))


def request_server_node(nodes: Nodes, work: Path, rank: int, command: Sequence[str]) -> None:
    """Write a request for one of the nodes that run only servers; the command gets the environment of that node."""
    _request(server_node_folder(work, nodes, rank), command, {}, outside_job=False)


def _request(folder: Path, command: Sequence[str], environment: Mapping[str, str], *, outside_job: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob(REQUEST_FILES)))
    request = {"command": list(command), "environment": dict(environment), "outside_job": outside_job}
    write_whole(folder / f"{number}.json", json.dumps(request))


def _own_environment(environment: Mapping[str, str], nodes: Nodes, *, outside_job: bool) -> dict[str, str]:
    """Return this node's environment with the variables of a request, and without ranks set by another launcher."""
    own = without_outer_job(os.environ) if outside_job else {**os.environ}
    for name in launcher_variables(own):
        del own[name]
    return {**own, **gloo_interface(nodes, own), **environment, RUNNER_VARIABLE: str(os.getpid())}


def gloo_interface(nodes: Nodes, environment: Mapping[str, str]) -> dict[str, str]:
    """Return GLOO_SOCKET_IFNAME if this node's host name resolves to the loopback, whose address gloo would announce.

    Debian writes `127.0.1.1 NAME` to /etc/hosts. The result is empty for one node, for a host name with a usable
    address, and if the user has set the variable.
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
    """Return the network interface of the default route; None if there is none."""
    try:
        rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    except OSError:
        return None
    return next((row[0] for row in rows if len(row) > 1 and row[1] == "00000000"), None)


def release_nodes(nodes: Nodes, work: Path) -> None:
    """Let the other nodes exit, because the stage has ended."""
    if nodes.count + nodes.servers > 1:
        folder = requests_folder(work, nodes)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / END).touch()


def serve_requests(nodes: Nodes, work: Path, is_published: Callable[[], bool], output: IO[bytes]) -> int:
    """Start the requested processes on a node other than the first.

    Returns:
        0 when node 0 has released this node or the stage is published, else the exit code of processes that failed.
    """
    end, number = requests_folder(work, nodes) / END, 0
    is_for_servers = nodes.rank >= nodes.count
    folder = server_node_folder(work, nodes, nodes.rank) if is_for_servers else end.parent
    while not end.is_file() and not is_published():
        request = folder / f"{number}.json"
        if not request.is_file():
            time.sleep(POLL_S)
            continue
        number += 1
        code = _serve(json.loads(request.read_text()), nodes, output)
        if code:
            return code
    return 0


@contextmanager
def shielded() -> Iterator[None]:
    """Let processes that are started in this context, and their children, never receive SIGTERM.

    Slurm sends it to every process of a job that it preempts. NeMo-Aligner, torchrun and Triton would end before the
    runner has requested a checkpoint. A blocked signal stays blocked in programs that install a handler for it. The
    runner ends these processes with SIGINT, which they do not ignore even if a script's `&` lets the runner ignore it.
    """
    is_ignored = is_main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if is_ignored:
        signal.signal(signal.SIGINT, lambda *_: None)  # a child gets the default action instead
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_agent(
    command: Sequence[str],
    environment: Mapping[str, str],
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start an agent that ignores stop signals, at which it would end its ranks before they have saved.

    Only SIGINT ends it (`end_agent`). A child process inherits which signals its parent ignores; a script's `&` lets
    this process ignore SIGINT, and other threads than the main one cannot ignore signals. In both cases, a session of
    its own keeps the signals of a terminal from the agent.
    """
    is_main, in_background = is_main_thread(), signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    handlers: dict[int, Any] = dict.fromkeys(SIGNALS.values(), signal.SIG_IGN)
    if in_background:
        handlers[signal.SIGINT] = lambda *_: None  # the child gets the default action
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()} if is_main else {}
    try:
        own_session = in_background or not is_main
        return subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr, start_new_session=own_session)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(request: Mapping[str, object], nodes: Nodes, output: IO[bytes]) -> int:
    command, environment = request["command"], request["environment"]
    assert isinstance(command, list)
    assert isinstance(environment, dict)
    outside_job = bool(request.get("outside_job"))
    own = _own_environment(environment, nodes, outside_job=outside_job)
    with shielded() if outside_job else nullcontext():
        process = start_agent(_for_node(command, nodes.rank), own, output, output)
    try:
        return process.wait()
    except BaseException:
        end_agent(process)
        raise


def end_agent(process: subprocess.Popen[bytes]) -> None:
    """End an agent with SIGINT, on which it ends its ranks; if it were killed, they would keep running."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SHUTDOWN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _for_node(command: Sequence[str], rank: int) -> list[str]:
    return [f"--node-rank={rank}" if word == "--node-rank={rank}" else word for word in command]


def requests_folder(work: Path, nodes: Nodes) -> Path:
    """Return the folder of the requests of this start of the job."""
    return work / REQUESTS / nodes.attempt


def server_node_folder(work: Path, nodes: Nodes, rank: int) -> Path:
    """Return the folder of the requests for one of the nodes that run only servers."""
    return requests_folder(work, nodes) / f"node-{rank}"
