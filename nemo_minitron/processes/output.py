"""Logging of the output of a stage's processes, without secrets.

A separate process (`start log`) copies the output to the log. It exits after the last process that writes to it, so
that the log also has what ranks write after their runner was killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import IO

from nemo_minitron.processes.same_code import SAFE_PATH, START
from nemo_minitron.system.disclosure import looks_secret, masked, secrets_in

TIMEOUT_S = 10.0
"""How long to wait for the end of the output; a process that still runs may keep the pipe open."""
_BLOCK_BYTES, _MAX_LINE_BYTES = 1 << 16, 1 << 20
_FURTHER = "MINITRON_SECRET_"


@contextmanager
def without_secrets(log: IO[str], further: Mapping[str, str] = MappingProxyType({})) -> Iterator[IO[bytes]]:
    """Yield a stream for stdout and stderr of processes that is copied to the log without secrets.

    Args:
        further: environment variables whose secrets are masked in addition to those of this process.
    """
    hidden = {f"{_FURTHER}{name}": value for name, value in further.items() if looks_secret(name)}
    copier = subprocess.Popen(
        [sys.executable, str(START), "log"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env={**os.environ, **SAFE_PATH, **hidden},
        start_new_session=True,  # Ctrl-C must not end it
    )
    assert copier.stdin is not None
    try:
        yield copier.stdin
    finally:
        with suppress(BrokenPipeError):
            copier.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            copier.wait(TIMEOUT_S)


def main() -> int:
    """Copy stdin to stdout line by line, without the secrets in the environment variables."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    longest = max((len(os.fsencode(value)) for value in secrets_in(os.environ)), default=0)
    left = b""
    while block := os.read(0, _BLOCK_BYTES):
        left += block
        end = max(left.rfind(b"\n"), left.rfind(b"\r")) + 1
        if not end and len(left) > _MAX_LINE_BYTES:
            left = _masked(left)
            end = len(left) - longest  # the rest may be the beginning of a secret
        _write(_masked(left[:end]))
        left = left[end:]
    _write(_masked(left))
    return 0


def _masked(line: bytes) -> bytes:
    return os.fsencode(masked(os.fsdecode(line)))


def _write(text: bytes) -> None:
    """Write the text. On a full disk the rest is lost; the processes continue, and their stage reports the error."""
    with suppress(OSError):
        while text:
            text = text[os.write(1, text) :]
