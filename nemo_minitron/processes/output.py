"""What processes of a stage print, copied into a log without secrets.

The copy is made by a process of its own (`start log`). It ends when the last of those that print has ended: where a
runner is killed, its ranks still save themselves, and a closed pipe would stop them.
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

PATIENCE_S = 10.0
"""How long the end of a log is waited for: a process that was left behind may hold the pipe open."""
_BLOCK_BYTES, _MOST_OF_A_LINE_BYTES = 1 << 16, 1 << 20
_FURTHER = "MINITRON_SECRET_"


@contextmanager
def without_secrets(log: IO[str], further: Mapping[str, str] = MappingProxyType({})) -> Iterator[IO[bytes]]:
    """A stream for stdout and stderr of processes, which ends in the log.

    Args:
        further: variables whose secrets are masked besides those of this process.
    """
    hidden = {f"{_FURTHER}{name}": value for name, value in further.items() if looks_secret(name)}
    copier = subprocess.Popen(
        [sys.executable, str(START), "log"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env={**os.environ, **SAFE_PATH, **hidden},
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert copier.stdin is not None
    try:
        yield copier.stdin
    finally:
        with suppress(BrokenPipeError):
            copier.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            copier.wait(PATIENCE_S)


def main() -> int:
    """Copy stdin to stdout, line by line, without the secrets of the environment."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    longest = max((len(os.fsencode(value)) for value in secrets_in(os.environ)), default=0)
    left = b""
    while block := os.read(0, _BLOCK_BYTES):
        left += block
        end = max(left.rfind(b"\n"), left.rfind(b"\r")) + 1
        if not end and len(left) > _MOST_OF_A_LINE_BYTES:
            left = _masked(left)
            end = len(left) - longest  # the rest may be the beginning of a secret
        _write(_masked(left[:end]))
        left = left[end:]
    _write(_masked(left))
    return 0


def _masked(line: bytes) -> bytes:
    return os.fsencode(masked(os.fsdecode(line)))


def _write(text: bytes) -> None:
    """On a full disk the rest is lost; the processes go on, and their stage says what it could not write."""
    with suppress(OSError):
        while text:
            text = text[os.write(1, text) :]
