"""The agent of one node: the environment of its ranks, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_minitron.processes.agent import FAILED_FILE, RENDEZVOUS_VARIABLE
from nemo_minitron.processes.nodes import Nodes, end_agent, start_agent

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
def record(number, _):
    (folder / f"signal.{rank}").write_text(f"{number} {Path(os.environ['MINITRON_MEETING'], 'failed').exists()}")
    sys.exit(0)
signal.signal(signal.SIGTERM, record)
signal.signal(signal.SIGINT, record)
place = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
(folder / f"new.{rank}").write_text(json.dumps({"pid": os.getpid(), **place}))
os.replace(folder / f"new.{rank}", folder / f"rank.{rank}")
"""
WAITS = "time.sleep(60)"


def _start(folder: Path, last_line: str) -> subprocess.Popen[bytes]:
    (folder / "script.py").write_text(SCRIPT + last_line)
    words = Nodes().command(sys.executable, 2, [str(folder / "script.py"), str(folder)])
    return subprocess.Popen(words, env={**os.environ, RENDEZVOUS_VARIABLE: str(folder)})


def _ranks(folder: Path) -> list[dict[str, str]]:
    files = [folder / f"rank.{rank}" for rank in (0, 1)]
    _wait_until(lambda: all(file.is_file() for file in files))
    return [json.loads(file.read_text()) for file in files]


def _wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_the_agent_sets_the_rank_variables(tmp_path: Path) -> None:
    agent = _start(tmp_path, "sys.exit(0)")
    assert agent.wait(60) == 0
    for rank, found in enumerate(_ranks(tmp_path)):
        del found["pid"]
        assert found == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_a_failed_rank_ends_the_others_and_they_know_the_reason(end: str, code: int, tmp_path: Path) -> None:
    wait = "while not (folder / 'rank.0').exists(): time.sleep(0.01)\n"
    agent = _start(tmp_path, f"if rank == '1':\n    {wait}    {end}\n{WAITS}")
    assert agent.wait(60) == code
    assert (tmp_path / "signal.0").read_text() == f"{int(signal.SIGTERM)} True"
    assert (tmp_path / FAILED_FILE).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_agent_forwards_stop_signals_to_all_ranks(number: signal.Signals, tmp_path: Path) -> None:
    agent = _start(tmp_path, WAITS)
    _ranks(tmp_path)
    agent.send_signal(number)
    assert agent.wait(60) == 128 + number
    for rank in (0, 1):
        assert (tmp_path / f"signal.{rank}").read_text() == f"{int(number)} False"


def _agent_here(folder: Path) -> subprocess.Popen[bytes]:
    (folder / "script.py").write_text(SCRIPT + WAITS)
    words = Nodes().command(sys.executable, 2, [str(folder / "script.py"), str(folder)])
    return start_agent(words, {**os.environ, RENDEZVOUS_VARIABLE: str(folder)})


@pytest.mark.parametrize("in_background", [False, True])
def test_only_a_stop_request_of_the_runner_ends_its_agent(in_background: bool, tmp_path: Path) -> None:
    """A script that starts the runner with `&` lets it and its children ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    try:
        agent = _agent_here(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    _ranks(tmp_path)
    # Ctrl-C of the script's terminal does not reach the agent of a runner that ignores it.
    assert (os.getsid(agent.pid) == agent.pid) == in_background
    agent.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert agent.poll() is None
    end_agent(agent)
    assert [(tmp_path / f"signal.{rank}").read_text() for rank in (0, 1)] == [f"{int(signal.SIGINT)} False"] * 2


def test_an_agent_can_be_started_in_another_thread(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        agent = pool.submit(_agent_here, tmp_path).result()
    _ranks(tmp_path)
    end_agent(agent)
    assert agent.wait(60) == 128 + signal.SIGINT


def test_a_rank_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    code = "import sys; from nemo_minitron.processes import agent; agent.GRACE_S = 0.5; "
    code += "sys.exit(agent.main('2', *sys.argv[1:]))"
    (tmp_path / "script.py").write_text(SCRIPT + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITS)
    words = [sys.executable, "-c", code, sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    agent = subprocess.Popen(words, env={**os.environ, RENDEZVOUS_VARIABLE: str(tmp_path)})
    pids = [int(rank["pid"]) for rank in _ranks(tmp_path)]
    time.sleep(0.3)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(60) == 128 + signal.SIGTERM
    assert not any(_lives(pid) for pid in pids)


def test_ranks_end_after_their_runner_was_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT + WAITS)
    words = Nodes().command(sys.executable, 2, [str(tmp_path / "script.py"), str(tmp_path)])
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    rendezvous = tmp_path / "rendezvous"
    rendezvous.mkdir()
    runner = subprocess.Popen(
        [sys.executable, "-c", code, *words], env={**os.environ, RENDEZVOUS_VARIABLE: str(rendezvous)}
    )
    pids = [int(rank["pid"]) for rank in _ranks(tmp_path)]
    runner.kill()
    runner.wait()
    _wait_until(lambda: not any(_lives(pid) for pid in pids) and not rendezvous.exists())
