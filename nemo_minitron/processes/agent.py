"""The agent of one node: it starts the node's ranks, and ends all of them if one fails or a stop is requested.

The agent opens no port, unlike torchrun, whose store accepts commands and pickles from every user of the machine. It
uses only the standard library, so that a Python without nemo-minitron can run it (`nemo_minitron/start`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

RENDEZVOUS_VARIABLE = "MINITRON_MEETING"
"""Environment variable with the rendezvous folder of this machine's ranks (backends/megatron/runtime/rendezvous.py)."""
FAILED_FILE = "failed"
"""File in that folder that exists once a rank has failed and the others are being ended."""
POLL_S, GRACE_S, TOUCH_INTERVAL_S = 0.05, 15.0, 3600.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def rendezvous_folder() -> Iterator[dict[str, str]]:
    """Create a folder that only this user can open, and yield the environment variables with which ranks find it."""
    folder = Path(tempfile.mkdtemp(prefix="minitron-"))
    try:
        yield {RENDEZVOUS_VARIABLE: str(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def a_rank_failed() -> bool:
    """Return whether the agent is ending this process because another rank has failed."""
    folder = os.environ.get(RENDEZVOUS_VARIABLE)
    return folder is not None and Path(folder, FAILED_FILE).exists()


def main(num_ranks: str, *command: str) -> int:
    """Run the ranks. Return 0 if all succeed, else the exit code of a failed rank (128 + N after signal N)."""
    received: list[int] = []
    for number in SIGNALS:
        # Signals that are ignored at the start stay ignored: then the runner itself forwards stop requests.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(number))
    runner, ranks = os.getppid(), list[subprocess.Popen[bytes]]()
    try:
        for rank in range(int(num_ranks)):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            ranks.append(subprocess.Popen(command, env={**os.environ, **place}))
        return _watch(ranks, runner, received)
    finally:
        _end(ranks, signal.SIGKILL)
        if os.getppid() != runner and RENDEZVOUS_VARIABLE in os.environ:
            shutil.rmtree(os.environ[RENDEZVOUS_VARIABLE], ignore_errors=True)


def _watch(ranks: Sequence[subprocess.Popen[bytes]], runner: int, received: Sequence[int]) -> int:
    touched_s = time.monotonic()
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            _mark_failure()
            _end(ranks, signal.SIGTERM)
            return failed if failed > 0 else 128 - failed
        if None not in codes:
            return 0
        if received or os.getppid() != runner:
            number = received[0] if received else signal.SIGTERM
            _end(ranks, number)
            return 128 + number
        if time.monotonic() - touched_s > TOUCH_INTERVAL_S:
            touched_s = time.monotonic()
            _touch_rendezvous_folder()
        time.sleep(POLL_S)


def _end(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send the signal to all running ranks, and kill those that are still running after GRACE_S."""
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        rank.send_signal(number)
    until = time.monotonic() + GRACE_S
    for rank in running:
        try:
            rank.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _mark_failure() -> None:
    """Create FAILED_FILE, so that the other ranks do not mistake the agent's signal for a stop request by the user."""
    folder = os.environ.get(RENDEZVOUS_VARIABLE)
    with suppress(OSError):
        if folder:
            Path(folder, FAILED_FILE).touch()


def _touch_rendezvous_folder() -> None:
    """Update the modification times, because programs that clean /tmp remove files that are days old."""
    folder = os.environ.get(RENDEZVOUS_VARIABLE)
    with suppress(OSError):
        for path in [Path(folder), *Path(folder).iterdir()] if folder else []:
            os.utime(path)
