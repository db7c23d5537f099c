"""Requests to stop: signals, and a file in the run's folder. And ranks that end with their runner."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
"""In the folder of a run: put there by a person."""
RELAY_FILE = "stop_request"
"""In the work folder of a stage: the runner tells its ranks which signal it got."""
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGHUP": signal.SIGHUP}
"""SIGHUP: the terminal, or the connection to it, is gone."""
REASONS = (*SIGNALS, f"the file {STOP_FILE}")
WATCH_INTERVAL_S = 0.5


STOP_VARIABLE = "MINITRON_STOP_FILE"
"""Names a file in which the script of a job leaves the signal that it got."""


class StopRequest:
    """Whether this process was asked to stop, and by what.

    Args:
        run_dir: a file `STOP` in it is a request; None: only signals are.
        relay: a file with the name of a signal that another process got.
    """

    def __init__(self, run_dir: Path | None = None, relay: Path | None = None) -> None:
        self.file = None if run_dir is None else run_dir / STOP_FILE
        self.relay = relay
        self._signal: str | None = None
        self._waits = False

    def asked_by(self) -> str | None:
        """One of REASONS, or None."""
        if self._signal is None and self.relay is not None and self.relay.is_file():
            self._signal = self.relay.read_text().strip() or None
        if self._signal is not None:
            return self._signal
        return REASONS[-1] if self.file is not None and self.file.is_file() else None

    def clear(self) -> bool:
        """Remove a STOP file that an earlier run has left; whether there was one."""
        if self.file is None or not self.file.is_file():
            return False
        self.file.unlink()
        return True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted, for `asked_by`; outside it interrupts at once."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGNALS; does nothing outside the main thread, where Python allows no handlers.

        A SIGHUP that is ignored stays ignored: `nohup` asks for that.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [number for number in SIGNALS.values() if number != signal.SIGHUP or _kills(number)]
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGHUP:
            leave_terminal()
        if not self._waits:
            raise KeyboardInterrupt(self._signal)


def leave_terminal(*_: object) -> None:
    """Write to nowhere from now on what would go to a terminal: writing to one that is gone is an error."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def _kills(number: signal.Signals) -> bool:
    """Whether the signal would end this process: nobody has asked for something else."""
    return signal.getsignal(number) is signal.SIG_DFL


def stop_file_of_job() -> Path | None:
    """Where the script of a job tells that its time is nearly up; None outside such a job."""
    name = os.environ.get(STOP_VARIABLE)
    return Path(name) if name else None


def exit_without_parent(other: int | None = None) -> None:
    """Start a thread that ends this process soon after its parent or the process `other` has died, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and (other is None or _is_alive(other)):
            time.sleep(WATCH_INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
