"""A process that imports NeMo-Aligner once and runs each requested task in a fork of itself.

An import of NeMo takes at least 7 s of CPU time. Every task starts from the state after the imports: it has its own
memory, random numbers and process groups, and all of them are freed when it ends. The server runs no tensor operations
itself, because the threads of a parallel operation would not exist in a fork. A process that has initialized CUDA
cannot be forked, so this is for the CPU only.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

COMMAND = "fork_server"
"""First argument of entry/ that starts a server; the same as in ../fork_server.py, which this module cannot import."""


def serve(descriptor: int, run_file: Callable[[Path], int]) -> int:
    """Run tasks until the runner closes its end of the socket.

    A request is a JSON line {"task_file", "variables"}. The answers are two lines: the id of the task's process, which
    leads a process group of its own, and the exit code.
    """
    gc.collect()
    gc.freeze()  # so that the collector does not write to memory that forks share
    with socket.socket(fileno=descriptor) as channel, channel.makefile("r") as requests:
        for line in requests:
            request = json.loads(line)
            child = os.fork()
            if child == 0:
                os._exit(_run(request, descriptor, run_file))
            with suppress(OSError):  # the child has done it, or has ended
                os.setpgid(child, child)
            _answer(channel, child)
            _, status = os.waitpid(child, 0)
            with suppress(ProcessLookupError):  # its helpers have no one else to end them if the runner is gone
                os.killpg(child, signal.SIGKILL)
            _answer(channel, os.waitstatus_to_exitcode(status))
    return 0


def _run(request: Mapping[str, object], descriptor: int, run_file: Callable[[Path], int]) -> int:
    os.setpgid(0, 0)
    # A task does not keep the socket open, so that the runner sees its end if only the server is killed.
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), descriptor)
    variables = request["variables"]
    assert isinstance(variables, dict)
    os.environ.update(variables)
    try:
        return run_file(Path(str(request["task_file"])))
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1


def _answer(channel: socket.socket, number: int) -> None:
    """Send a line. If the runner is gone, end this process group; the task ends itself."""
    try:
        channel.sendall(f"{number}\n".encode())
    except OSError:
        os.killpg(0, signal.SIGKILL)
