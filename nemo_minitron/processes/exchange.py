"""Files by which a runner and the processes of a stage exchange their result or their error.

The ranks of a Megatron session and the processes of an alignment backend use the same files. NeMo-Aligner's scripts
cannot import this module: `entry/task.py` repeats the names, and a test compares them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.run_paths import ERROR, RESULT
from nemo_minitron.system.safe_files import write_reserved, write_whole

ERROR_BYTES = 8192


def prepare(work_dir: Path, *requests: str) -> None:
    """Remove the files of an earlier start, and reserve space for an error message, because the disk may be full.

    Args:
        requests: names of files by which a stop is requested or progress is shown.
    """
    for name in (RESULT, *requests):
        (work_dir / name).unlink(missing_ok=True)
    write_whole(work_dir / ERROR, " " * ERROR_BYTES)


def save_result(result: dict[str, Any], work_dir: Path) -> None:
    """Write the result of the main process."""
    write_whole(work_dir / RESULT, json.dumps(result))


def load_result(work_dir: Path) -> dict[str, Any] | None:
    """Return the result; None if no process has written one."""
    file = work_dir / RESULT
    return dict(json.loads(file.read_text())) if file.is_file() else None


def save_error(fields: dict[str, Any], work_dir: Path) -> None:
    """Write an error into the reserved space."""
    write_reserved(work_dir / ERROR, json.dumps(fields).ljust(ERROR_BYTES).encode())


def load_error(work_dir: Path) -> dict[str, Any] | None:
    """Return the fields of the error; None if no process has written one."""
    file = work_dir / ERROR
    text = file.read_text().strip() if file.is_file() else ""
    return dict(json.loads(text)) if text else None
