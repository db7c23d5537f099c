"""Seconds that a stage has taken over all of its attempts: those before an interruption count as well."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from nemo_minitron.system.files import write_whole

ATTEMPTS_FILE = "attempts.json"


def begin_attempt(work: Path, progress: Path) -> float:
    """Record in the work folder that an attempt begins; return the seconds of the attempts before it.

    An attempt that was killed lasted until its last progress was written. The seconds come from the system clock, so
    they are approximate, and never negative. A damaged record, which a crash of the machine may leave, counts nothing.

    Args:
        progress: file with the progress of the stage.
    """
    file, earlier_s = work / ATTEMPTS_FILE, 0.0
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        before = json.loads(file.read_text(encoding="utf-8"))
        last_s = progress.stat().st_mtime if progress.is_file() else before["began"]
        earlier_s = before["earlier_s"] + max(0.0, last_s - before["began"])
    write_whole(file, json.dumps({"earlier_s": earlier_s, "began": time.time()}))
    return earlier_s
