"""Servers that a training calls: on this machine, or on the nodes that its job reserves for them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import TaskContext
from nemo_minitron.backends.alignment.nemo_aligner import tunnel
from nemo_minitron.backends.alignment.nemo_aligner.server_host import LISTENING_FILE, SERVERS_FILE
from nemo_minitron.backends.alignment.nemo_aligner.servers import (
    POLL_S,
    READY_TIMEOUT_S,
    Running,
    ServerTask,
    running,
)
from nemo_minitron.errors import EnvironmentProblem, Interrupted, ProcessesDied
from nemo_minitron.processes import exchange
from nemo_minitron.processes.nodes import Nodes, request_server_node, requests_folder, server_node_folder
from nemo_minitron.processes.same_code import START, of_this_process
from nemo_minitron.system.interrupts import STOP_FILE, StopRequest
from nemo_minitron.system.safe_files import replacing, write_whole

ERROR_TIMEOUT_S, END_TIMEOUT_S = 10.0, 30.0
"""How long to wait for the error of a server after a client has failed, and for the end of the servers; other nodes see
files with a delay."""


def serving(servers: Sequence[ServerTask], context: TaskContext, *, on_cpu: bool) -> AbstractContextManager[Running]:
    """Return the context in which the servers run.

    Raises:
        EnvironmentProblem: the job has several nodes, and none for servers; or see `servers.running`.
    """
    nodes = Nodes.here()
    if nodes.servers:
        return _on_server_nodes(servers, nodes, context, on_cpu=on_cpu)
    if nodes.count > 1:
        raise EnvironmentProblem(
            "A training on rewards on several nodes needs a node for its servers, and this job has none.",
            where=f"stages.{context.stage}",
            next_step=f"Launch it again with execution.server_nodes_by_stage.{context.stage}=1.",
        )
    threads = context.threads or nodes.threads_of_each(context.layout.world_size)
    return running(servers, threads, context.stop, on_cpu=on_cpu)


@contextmanager
def _on_server_nodes(
    servers: Sequence[ServerTask], nodes: Nodes, context: TaskContext, *, on_cpu: bool
) -> Iterator[Running]:
    """Distribute the servers over the nodes for them."""
    shared = requests_folder(context.work_dir, nodes)
    shared.mkdir(parents=True, exist_ok=True)
    with replacing(shared / tunnel.SECRET_FILE, private=True) as file:
        file.write(tunnel.new_secret())
    count = min(nodes.servers, len(servers))
    hosts = {server_node_folder(context.work_dir, nodes, nodes.count + index): index for index in range(count)}
    common = {"code": of_this_process(), "first_node": nodes.address, "threads": context.threads, "on_cpu": on_cpu}

    def watch() -> None:
        for host in hosts:
            error = exchange.load_error(host)
            if error is not None:
                raise (ProcessesDied if error.pop("died", False) else EnvironmentProblem)(**error)

    try:
        for host, index in hosts.items():
            _request(host, {**common, "servers": [_as_json(server) for server in servers[index::count]]})
            request_server_node(
                nodes, context.work_dir, nodes.count + index, [sys.executable, str(START), "servers", str(host)]
            )
        addresses = _wait_until_listening(list(hosts), watch, context.stop)
        places = {server.number: addresses[number % count] for number, server in enumerate(servers)}
        write_whole(shared / tunnel.ADDRESSES_FILE, json.dumps(places))
        yield Running({tunnel.SERVERS_VARIABLE: str(shared)}, watch)
    except EnvironmentProblem:
        _wait_for_error(watch)
        raise
    finally:
        _end(list(hosts))
        (shared / tunnel.SECRET_FILE).unlink(missing_ok=True)


def _request(host: Path, content: Mapping[str, Any]) -> None:
    host.mkdir(parents=True, exist_ok=True)
    exchange.prepare(host, LISTENING_FILE, STOP_FILE)
    write_whole(host / SERVERS_FILE, json.dumps(content))


def _as_json(server: ServerTask) -> dict[str, Any]:
    return {**asdict(server), "work_dir": str(server.work_dir)}


def _wait_until_listening(hosts: Sequence[Path], watch: Callable[[], None], stop: StopRequest) -> list[Any]:
    """Return [address, port] of each node."""
    until = time.monotonic() + READY_TIMEOUT_S + ERROR_TIMEOUT_S
    while not all((host / LISTENING_FILE).is_file() for host in hosts):
        if stop.source() is not None:
            raise Interrupted(f"Stopped before the first step as requested by {stop.source()}.")
        watch()
        if time.monotonic() > until:
            raise EnvironmentProblem(
                f"The nodes for servers did not become ready in {READY_TIMEOUT_S:.0f} s.",
                where=", ".join(map(str, hosts)),
            )
        time.sleep(POLL_S)
    return [json.loads((host / LISTENING_FILE).read_text()) for host in hosts]


def _wait_for_error(watch: Callable[[], None]) -> None:
    """Wait for the error of a server, which may be the cause of that of its client."""
    until = time.monotonic() + ERROR_TIMEOUT_S
    while time.monotonic() < until:
        watch()
        time.sleep(POLL_S)


def _end(hosts: Sequence[Path]) -> None:
    """Request the end of the servers, and wait for it; they would end with the job as well."""
    for host in hosts:
        if host.is_dir():
            (host / STOP_FILE).touch()
    until = time.monotonic() + END_TIMEOUT_S
    while time.monotonic() < until and any(exchange.load_result(host) is None for host in hosts):
        time.sleep(POLL_S)
