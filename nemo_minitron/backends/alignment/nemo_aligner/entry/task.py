"""Exchange of a task with the runner: arguments, progress, curves, result and error as files in a work folder."""

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
"""Variable with the id of the process on this node whose end also ends this one."""
RENDEZVOUS_VARIABLE, FAILED_FILE = "MINITRON_MEETING", "failed"
"""Variable with a folder, and the file in it with which the agent says that another rank has failed."""
WATCH_INTERVAL_S = 1.0
MESSAGE_LENGTH = 1000
STOP_FILE = "STOP"
"""File that the runner creates in the work folder to request an early end, with a checkpoint."""

after_runner: list[Callable[[], None]] = []
"""Called when the runner has ended without ending this process, before it ends itself."""

Task = Mapping[str, Any]


def load_backend_module(name: str) -> ModuleType:
    """Load a module of nemo_minitron/backends by its path, because the package cannot be imported here."""
    file = Path(__file__).resolve().parents[3] / name
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_main() -> bool:
    """Return whether this process writes the files: rank 0 of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run(work_dir: Path, function: Callable[[Task], Mapping[str, Any]], task: Task) -> int:
    """Run the task and write its result, or its error; returns the exit code."""
    if RUNNER_VARIABLE in os.environ:
        threading.Thread(target=_exit_with, args=(int(os.environ[RUNNER_VARIABLE]),), daemon=True).start()
    try:
        result = function(task)
    except BaseException as error:
        if is_main():
            facts = {"type": type(error).__name__, "message": _shortened(str(error))}
            _write_in_place(json.dumps(facts), work_dir / ERROR_FILE)
        traceback.print_exc()
        return 1
    if is_main():
        (work_dir / RESULT_FILE).write_text(json.dumps(dict(result)))
    return 0


def _shortened(message: str) -> str:
    """Leave out the middle of a long message: an error that a server reports has its cause at the end."""
    return message if len(message) <= MESSAGE_LENGTH else f"{message[:400]} ... {message[-600:]}"


def _write_in_place(text: str, file: Path) -> None:
    """Overwrite the space that the runner has reserved in the file, as a full disk has no other."""
    with file.open("r+b" if file.is_file() else "wb") as stream:
        stream.write(text.encode())
        stream.truncate()


def _exit_with(runner: int) -> None:
    """Kill this process group when the runner is gone: a restarted runner must be the only user of its work folder.

    Also end this rank when another one has failed, because the SIGTERM of the agent does not reach it.
    """
    folder = os.environ.get(RENDEZVOUS_VARIABLE)
    while True:
        if folder is not None and Path(folder, FAILED_FILE).exists():
            os._exit(1)
        try:
            os.kill(runner, 0)
        except ProcessLookupError:
            for function in after_runner:
                function()
            os.killpg(
                0, signal.SIGKILL
            )  # the whole group, because helpers spawned by libraries would not end otherwise
        time.sleep(WATCH_INTERVAL_S)


def report_progress(task: Task, step: int, max_steps: int) -> None:
    """Write the progress of the task, for the progress bar of the stage."""
    if is_main():
        (Path(task["work_dir"]) / PROGRESS_FILE).write_text(json.dumps({"step": step, "max_steps": max_steps}))


def rewrite_lines(file: Path, first_step: int) -> None:
    """Remove the JSON lines of steps after `first_step`, which a resumed run repeats."""
    if not is_main() or not file.is_file():
        return
    # A last line without a newline was cut off by a kill or a full disk.
    whole = file.read_text().rpartition("\n")[0].splitlines()
    kept = [line for line in whole if json.loads(line)["step"] <= first_step]
    partial = file.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(file)


class Curves:
    """Logger for NeMo-Aligner's trainers: writes one JSON line for each step, and the newest step to PROGRESS_FILE.

    When a run resumes, lines of steps that it will repeat are removed first: those after `first_step`, or all for -1.
    """

    def __init__(self, work_dir: Path, max_steps: int, first_step: int) -> None:
        self._file, self._now = work_dir / CURVES_FILE, work_dir / PROGRESS_FILE
        self._max_steps = max_steps
        rewrite_lines(self._file, first_step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append metrics. The trainer counts a step after it logs `train/...` and before it logs `val/...`."""
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
