"""One start of NeMo for all tasks of a stage that need one process on the CPU.

A process in NeMo-Aligner's environment imports it once, while the stage converts weights, and runs each task in a fork
of itself (entry/fork_server.py). Tasks share nothing but the imports.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

COMMAND = "fork_server"
"""The same as in entry/fork_server.py, which cannot import this package."""
_KILLED = -signal.SIGKILL


class Fork:
    """A task in a fork of the server, with the methods of `subprocess.Popen` that a runner uses."""

    def __init__(self, server: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.pid = server.pid
        """Leader of the process group to signal: the server until it has finished its imports, then the task."""
        self._channel = channel
        self._text = b""
        self._answers: list[int] = []
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; None while the task runs."""
        while self._code is None and self._receive(0.0):
            pass
        return self._code

    def wait(self, timeout: float) -> int:
        """Wait for the end of the task, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: the task still runs.
        """
        until = time.monotonic() + timeout
        while self._code is None:
            if not self._receive(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(COMMAND, timeout)
        return self._code

    def _receive(self, timeout_s: float) -> bool:
        """Read what the server has sent; returns False if there is nothing."""
        if not select.select([self._channel], [], [], timeout_s)[0]:
            return False
        try:
            received = self._channel.recv(1024)
        except ConnectionResetError:
            received = b""
        if not received:
            self._code = _KILLED  # the server has ended, and nobody waits for the task any more
            return True
        *lines, self._text = (self._text + received).split(b"\n")
        self._answers += map(int, lines)
        if self._answers:
            self.pid = self._answers[0]
        if len(self._answers) > 1:
            self._code = self._answers[1]
        return True


class ForkServer:
    """A process that has imported NeMo-Aligner, or is doing so."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._process, self._channel = process, channel

    def start(self, task_file: Path, variables: Mapping[str, str]) -> Fork:
        """Start a task, with more environment variables, when the server is ready; one task at a time."""
        request = {"task_file": str(task_file), "variables": dict(variables)}
        with suppress(OSError):  # a server that has ended is noticed by the fork
            self._channel.sendall(f"{json.dumps(request)}\n".encode())
        return Fork(self._process, self._channel)


@contextmanager
def serving(
    command: Sequence[str], tasks: Sequence[str], start: Callable[[list[str], tuple[int, ...]], subprocess.Popen[bytes]]
) -> Iterator[ForkServer]:
    """Start a server and end it with the block, in which every task must end.

    Args:
        command: Python and entry/.
        tasks: names of the tasks whose modules the server imports.
        start: starts a command with open file descriptors in a session of its own.
    """
    own, other = socket.socketpair()
    with own:
        with other:
            process = start([*command, COMMAND, str(other.fileno()), *tasks], (other.fileno(),))
        try:
            yield ForkServer(process, own)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
