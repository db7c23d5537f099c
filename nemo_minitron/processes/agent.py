"""The agent of one node: starts its ranks, and ends all of them when one fails or when it is asked to.

It listens on nothing, unlike torchrun, whose store takes commands and pickles from every user of the machine. It uses
the standard library only, so that a Python without nemo-minitron can run it (`nemo_minitron/start`).
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

MEETING_VARIABLE = "MINITRON_MEETING"
"""Names the folder where the ranks of this machine meet (backends/megatron/runtime/rendezvous.py)."""
FAILED_FILE = "failed"
"""In that folder, when a rank has failed and the others are being ended."""
POLL_S, GRACE_S, TOUCH_INTERVAL_S = 0.05, 15.0, 3600.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def meeting_folder() -> Iterator[dict[str, str]]:
    """A new folder that only this user can open; yields what the ranks need in their environment."""
    folder = Path(tempfile.mkdtemp(prefix="minitron-"))
    try:
        yield {MEETING_VARIABLE: str(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def a_rank_failed() -> bool:
    """Whether the agent is ending this process because another rank has failed."""
    folder = os.environ.get(MEETING_VARIABLE)
    return folder is not None and Path(folder, FAILED_FILE).exists()


def main(num_ranks: str, *command: str) -> int:
    """0 when all ranks have ended well, else the code of the first that did not (128 + N for a signal N)."""
    asked: list[int] = []
    for number in SIGNALS:
        # What is ignored stays ignored: the runner hands requests to stop on by itself.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: asked.append(number))
    runner, ranks = os.getppid(), list[subprocess.Popen[bytes]]()
    try:
        for rank in range(int(num_ranks)):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            ranks.append(subprocess.Popen(command, env={**os.environ, **place}))
        return _watch(ranks, runner, asked)
    finally:
        _end(ranks, signal.SIGKILL)
        if os.getppid() != runner and MEETING_VARIABLE in os.environ:
            shutil.rmtree(os.environ[MEETING_VARIABLE], ignore_errors=True)


def _watch(ranks: Sequence[subprocess.Popen[bytes]], runner: int, asked: Sequence[int]) -> int:
    touched_s = time.monotonic()
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            _tell_of_failure()
            _end(ranks, signal.SIGTERM)
            return failed if failed > 0 else 128 - failed
        if None not in codes:
            return 0
        if asked or os.getppid() != runner:
            number = asked[0] if asked else signal.SIGTERM
            _end(ranks, number)
            return 128 + number
        if time.monotonic() - touched_s > TOUCH_INTERVAL_S:
            touched_s = time.monotonic()
            _keep_young()
        time.sleep(POLL_S)


def _end(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send the signal, and kill what is left after a time of grace."""
    left = [rank for rank in ranks if rank.poll() is None]
    for rank in left:
        rank.send_signal(number)
    until = time.monotonic() + GRACE_S
    for rank in left:
        try:
            rank.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _tell_of_failure() -> None:
    """So that the other ranks do not take the signal that they get for a person's."""
    folder = os.environ.get(MEETING_VARIABLE)
    with suppress(OSError):
        if folder:
            Path(folder, FAILED_FILE).touch()


def _keep_young() -> None:
    """Programs that clean /tmp remove files that nobody has changed for days."""
    folder = os.environ.get(MEETING_VARIABLE)
    with suppress(OSError):
        for path in [Path(folder), *Path(folder).iterdir()] if folder else []:
            os.utime(path)
