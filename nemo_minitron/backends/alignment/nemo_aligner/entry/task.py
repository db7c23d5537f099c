"""The order that a process of this folder gets, and how it answers: JSON files in the stage's work folder."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

PROGRESS_FILE, CURVES_FILE, RESULT_FILE, ERROR_FILE = "aligner.json", "curves.jsonl", "result.json", "error.json"
RUNNER_VARIABLE = "MINITRON_RUNNER"
"""The process of this node with which this one ends."""
WATCH_INTERVAL_S = 1.0
STOP_FILE = "STOP"
"""Appears in the work folder when the training is to end early, with a checkpoint."""

Task = Mapping[str, Any]


def of_the_package(name: str) -> ModuleType:
    """A module of nemo_minitron/backends, loaded by its path, because the package cannot be imported here."""
    file = Path(__file__).resolve().parents[3] / name
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_main() -> bool:
    """Whether this process answers: rank 0 of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def answer(work_dir: Path, function: Callable[[Task], Mapping[str, Any]], task: Task) -> int:
    """Run the task; write its result, or what went wrong. Returns the exit code."""
    if RUNNER_VARIABLE in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[RUNNER_VARIABLE]),), daemon=True).start()
    try:
        result = function(task)
    except BaseException as error:
        if is_main():
            facts = {"type": type(error).__name__, "message": str(error)[:1000]}
            _write_in_place(json.dumps(facts), work_dir / ERROR_FILE)
        traceback.print_exc()
        return 1
    if is_main():
        (work_dir / RESULT_FILE).write_text(json.dumps(dict(result)))
    return 0


def _write_in_place(text: str, file: Path) -> None:
    """In the room that the runner has kept: a full disk has no other."""
    with file.open("r+b" if file.is_file() else "wb") as stream:
        stream.write(text.encode())
        stream.truncate()


def _end_with(runner: int) -> None:
    """A runner that was killed starts again, and must find its work folder to itself."""
    while True:
        try:
            os.kill(runner, 0)
        except ProcessLookupError:
            os.killpg(0, signal.SIGKILL)  # the whole group: a helper that a library has spawned would stay for ever
        time.sleep(WATCH_INTERVAL_S)


def tell(task: Task, step: int, max_steps: int) -> None:
    """How far the task is, for the bar of the stage."""
    if is_main():
        (Path(task["work_dir"]) / PROGRESS_FILE).write_text(json.dumps({"step": step, "max_steps": max_steps}))


class Curves:
    """A logger for NeMo-Aligner's trainers: one JSON line for each step, and the newest in a file to look at.

    Lines of steps that a resumed run makes again are left out first.
    """

    def __init__(self, work_dir: Path, max_steps: int, first_step: int) -> None:
        self._file, self._now = work_dir / CURVES_FILE, work_dir / PROGRESS_FILE
        self._max_steps = max_steps
        if is_main() and self._file.is_file():
            # A last line without an end was cut off by a kill or a full disk.
            whole = self._file.read_text().rpartition("\n")[0].splitlines()
            kept = [line for line in whole if json.loads(line)["step"] <= first_step]
            partial = self._file.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(self._file)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Called with `train/...` before the step is counted, and with `val/...` after it."""
        if not is_main():
            return
        done = (step or 0) + (1 if any(name.startswith("train/") for name in metrics) else 0)
        row = {"step": done, **{name: float(value) for name, value in metrics.items()}}
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "train/loss" in row:
            partial = self._now.with_suffix(".partial")
            partial.write_text(json.dumps({"step": done, "max_steps": self._max_steps, "loss": row["train/loss"]}))
            partial.replace(self._now)
