"""Stop requests by signal or by a file in the run folder, and processes that end together with their parent."""

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
"""File in the run folder with which a user requests a stop."""
RELAY_FILE = "stop_request"
"""File in the work folder of a stage with the name of the signal that the runner received, read by its ranks."""
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGHUP": signal.SIGHUP}
"""Signals that request a stop. SIGHUP means that the terminal or the connection to it was closed."""
REASONS = (*SIGNALS, f"the file {STOP_FILE}")
WATCH_INTERVAL_S = 0.5


STOP_VARIABLE = "MINITRON_STOP_FILE"
"""Environment variable with the path of the file in which a job script writes the name of the signal it received."""


class StopRequest:
    """Stop request to this process, and its source.

    Args:
        run_dir: folder in which a file `STOP` requests a stop; None: only signals do.
        relay: file with the name of a signal that another process received.
    """

    def __init__(self, run_dir: Path | None = None, relay: Path | None = None) -> None:
        self.file = None if run_dir is None else run_dir / STOP_FILE
        self.relay = relay
        self._signal: str | None = None
        self._is_deferred = False

    def source(self) -> str | None:
        """Return the source of the stop request, one of REASONS; None: no stop was requested."""
        if self._signal is None and self.relay is not None and self.relay.is_file():
            self._signal = self.relay.read_text().strip() or None
        if self._signal is not None:
            return self._signal
        return REASONS[-1] if self.file is not None and self.file.is_file() else None

    def clear(self) -> bool:
        """Remove the STOP file of an earlier run, and return whether there was one."""
        if self.file is None or not self.file.is_file():
            return False
        self.file.unlink()
        return True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals in this context, for `source`. Outside of it they raise KeyboardInterrupt immediately."""
        before, self._is_deferred = self._is_deferred, True
        try:
            yield
        finally:
            self._is_deferred = before

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGNALS. Do nothing outside the main thread, where Python allows no signal handlers.

        SIGHUP stays ignored if it already is, as under `nohup`.
        """
        if not is_main_thread():
            yield
            return
        handled = [number for number in SIGNALS.values() if number != signal.SIGHUP or _has_default_action(number)]
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGHUP:
            detach_terminal()
        if not self._is_deferred:
            raise KeyboardInterrupt(self._signal)


def is_main_thread() -> bool:
    """Return whether this thread is the main one; Python allows signal handlers only there."""
    return threading.current_thread() is threading.main_thread()


def detach_terminal(*_: object) -> None:
    """Redirect stdout and stderr to /dev/null if they are a terminal: writing to a closed terminal is an error."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def _has_default_action(number: signal.Signals) -> bool:
    """Return whether the signal has its default action, which ends the process."""
    return signal.getsignal(number) is signal.SIG_DFL


def stop_file_of_job() -> Path | None:
    """Return the file in which the job script announces that its time limit is near; None outside such a job."""
    name = os.environ.get(STOP_VARIABLE)
    return Path(name) if name else None


def exit_without_parent(other: int | None = None) -> None:
    """Start a thread that ends this process after its parent or the process `other` has ended, even by SIGKILL."""
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
