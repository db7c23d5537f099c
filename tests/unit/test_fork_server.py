"""The fork server: one start for several tasks, which share nothing, and nothing that outlives its runner."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.backends.alignment.nemo_aligner import environment, fork_server, process
from nemo_minitron.backends.alignment.nemo_aligner.fork_server import ForkServer, serving
from nemo_minitron.errors import EnvironmentProblem, ProcessesDied
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress

ENTRY = f"""
import json, os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(environment.ENTRY)!r})
import fork_server, task

seen = []

def work(given):
    seen.append(given["name"])
    Path(given["work_dir"], "pid").write_text(str(os.getpid()))
    if given["name"] == "fails":
        raise ValueError("no such rows")
    if given["name"] == "with a helper":
        helper = subprocess.Popen(["sleep", "600"])
        Path(given["work_dir"], "helper").write_text(str(helper.pid))
    time.sleep(given.get("seconds", 0))
    return {{"seen": seen, "server": os.getppid(), "group": os.getpgid(0), "pid": os.getpid(),
            "variable": os.environ.get("GIVEN"), "imported": sys.argv[3:]}}

def run_file(file):
    given = json.loads(file.read_text())
    return task.run(Path(given["work_dir"]), work, given)

time.sleep(float(os.environ.get("IMPORT_S", "0")))
sys.exit(fork_server.serve(int(sys.argv[2]), run_file))
"""


@contextmanager
def _server(folder: Path, **variables: str) -> Iterator[tuple[ForkServer, subprocess.Popen[bytes]]]:
    script = folder / "entry.py"
    script.write_text(ENTRY)
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
        own = {**os.environ, "MINITRON_RUNNER": str(os.getpid()), **variables}
        started.append(subprocess.Popen(command, env=own, pass_fds=descriptors, start_new_session=True))
        return started[0]

    with serving([sys.executable, str(script)], ["sft", "to_nemo"], start) as server:
        yield server, started[0]


def _run(name: str, folder: Path, server: ForkServer, **options: Any) -> dict[str, Any]:
    task = {"name": name, **options.pop("task", {})}
    quiet = (Progress(silent=True), StopRequest())
    return process.run_task(name, task, folder / name, folder / "log", *quiet, server=server, **options)


def test_tasks_share_a_start_and_nothing_else(tmp_path: Path) -> None:
    with _server(tmp_path) as (server, started):
        one = _run("one", tmp_path, server, variables={"GIVEN": "x"})
        two = _run("two", tmp_path, server)
        assert (one["seen"], two["seen"]) == (["one"], ["two"])
        assert one["server"] == two["server"] == started.pid
        assert one["pid"] == one["group"] != two["pid"] == two["group"], "each leads a process group of its own"
        assert (one["variable"], two["variable"]) == ("x", None)
        assert one["imported"] == ["sft", "to_nemo"]
    assert started.poll() is not None


def test_a_failed_task_reports_its_error_and_the_server_goes_on(tmp_path: Path) -> None:
    with _server(tmp_path) as (server, _):
        with pytest.raises(EnvironmentProblem, match="task fails ended with code 1: ValueError: no such rows"):
            _run("fails", tmp_path, server)
        assert _run("after", tmp_path, server)["seen"] == ["after"]


@pytest.mark.parametrize("victim", ["task", "server", "server before it is ready"])
def test_a_killed_process_ends_the_task(victim: str, tmp_path: Path) -> None:
    early = victim == "server before it is ready"
    with _server(tmp_path, IMPORT_S="30" if early else "0") as (server, started):

        def kill() -> None:
            file = tmp_path / "long/pid"
            if early or (file.is_file() and file.read_text()):
                with suppress(ProcessLookupError):  # it has been killed by an earlier call
                    os.kill(int(file.read_text()) if victim == "task" else started.pid, signal.SIGKILL)

        with pytest.raises(ProcessesDied, match="task long ended with code -9"):
            _run("long", tmp_path, server, task={"seconds": 60}, watch=kill)
    if not early:
        _wait_for_end(int((tmp_path / "long/pid").read_text()))


def test_an_error_of_the_runner_ends_the_task_and_the_server(tmp_path: Path) -> None:
    def stop() -> None:
        if (tmp_path / "long/pid").is_file():
            raise EnvironmentProblem("a server of rewards has ended")

    with (
        pytest.raises(EnvironmentProblem, match="has ended"),
        _server(tmp_path) as (server, started),
    ):
        _run("long", tmp_path, server, task={"seconds": 60}, watch=stop)
    _wait_for_end(int((tmp_path / "long/pid").read_text()))
    assert started.poll() is not None


def test_nothing_outlives_a_killed_runner(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tests.unit import test_fork_server as test
with test._server(Path(sys.argv[1])) as (server, started):
    print(started.pid, flush=True)
    test._run("long", Path(sys.argv[1]), server, task={"seconds": 60})
"""
    runner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    server = int(runner.stdout.readline())
    file = tmp_path / "long/pid"
    until = time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    for pid in (int(file.read_text()), server):
        _wait_for_end(pid)


def test_the_helpers_of_a_task_end_with_it(tmp_path: Path) -> None:
    """The server ends them itself, because the runner may have been killed first."""
    script, file = tmp_path / "entry.py", tmp_path / "task.json"
    script.write_text(ENTRY)
    file.write_text(json.dumps({"name": "with a helper", "work_dir": str(tmp_path)}))
    own, other = socket.socketpair()
    with own, own.makefile("r") as answers:
        with other:
            command = [sys.executable, str(script), fork_server.COMMAND, str(other.fileno())]
            variables = {**os.environ, "MINITRON_RUNNER": str(os.getpid())}
            server = subprocess.Popen(command, env=variables, pass_fds=[other.fileno()], start_new_session=True)
        own.sendall(json.dumps({"task_file": str(file), "variables": {}}).encode() + b"\n")
        assert (int(answers.readline()) > 0, answers.readline()) == (True, "0\n")
        _wait_for_end(int((tmp_path / "helper").read_text()))
    server.wait(20)


def _wait_for_end(pid: int) -> None:
    """Wait until a process has ended; one that waits to be reaped has."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


def test_both_environments_name_the_command_alike() -> None:
    text = (environment.ENTRY / "fork_server.py").read_text()
    assert f"COMMAND = {json.dumps(fork_server.COMMAND)}" in text
