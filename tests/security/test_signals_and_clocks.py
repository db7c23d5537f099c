"""A terminal that is closed, and a clock that is set while a stage runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_minitron.artifacts.manifest import provenance
from nemo_minitron.system.interrupts import StopRequest
from tests.conftest import REPO


def test_closing_the_terminal_requests_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_minitron.system.interrupts.detach_terminal", lambda: None)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        stop = StopRequest()
        with stop.listening(), stop.deferred():
            signal.raise_signal(signal.SIGHUP)
            assert stop.source() == "SIGHUP"
        with pytest.raises(KeyboardInterrupt, match="SIGHUP"), stop.listening():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_nohup_has_started_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening():
            signal.raise_signal(signal.SIGHUP)
            assert stop.source() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_is_written_to_a_terminal_that_is_gone(tmp_path: Path) -> None:
    """A run that fails while it prints its last message would save nothing."""
    code = f"""
import os, pathlib, sys, time
from nemo_minitron.system.interrupts import StopRequest
stop = StopRequest()
with stop.listening(), stop.deferred():
    print("ready", flush=True)
    while not stop.source():
        time.sleep(0.01)
    print("to nobody", file=sys.stderr, flush=True)
    pathlib.Path({str(tmp_path / "saved")!r}).write_text(stop.source())
    os._exit(0)  # with the handler in place: the system may report the end of the terminal twice
"""
    ours, theirs = os.openpty()
    words = [sys.executable, "-c", code]
    child = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPO, start_new_session=True)
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    child.send_signal(signal.SIGHUP)
    assert child.wait(60) == 0
    assert (tmp_path / "saved").read_text() == "SIGHUP"


def test_a_clock_that_is_set_back_makes_no_negative_time(monkeypatch: pytest.MonkeyPatch) -> None:
    started_s, now = time.monotonic() - 5.0, time.time()
    monkeypatch.setattr("time.time", lambda: now - 86400.0)
    assert provenance(started_s)["wall_s"] == pytest.approx(5.0, abs=2.0)
