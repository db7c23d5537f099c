"""Runner and ranks run the same code: how ranks are started, and what they compare."""

from __future__ import annotations

import multiprocessing.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nemo_minitron
from nemo_minitron.errors import EnvironmentProblem

START = Path(nemo_minitron.__file__).resolve().with_name("start")
"""The folder that starts processes without the working folder on their import path."""
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""From Python 3.11 on, the same for what those processes start in turn."""


@contextmanager
def safe_path_of_children() -> Iterator[None]:
    """Inside, Python's own ways to start processes keep the working folder off their import path."""
    kept = {name: os.environ.get(name) for name in SAFE_PATH}
    util: Any = multiprocessing.util
    options = util._args_from_interpreter_flags
    os.environ.update(SAFE_PATH)
    if sys.version_info < (3, 11):
        # What multiprocessing starts gets this process's options, and -I here. That hides no package from a worker:
        # this process's import path replaces its own before it imports anything but the standard library.
        util._args_from_interpreter_flags = lambda: [*options(), "-I", f"-Xutf8={sys.flags.utf8_mode}"]
    try:
        yield
    finally:
        util._args_from_interpreter_flags = options
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def of_this_process() -> dict[str, str]:
    """What identifies the code that runs here."""
    return {"version": nemo_minitron.__version__, "package": str(Path(nemo_minitron.__file__).resolve().parent)}


def require_same(runner: Mapping[str, str]) -> None:
    """Raises EnvironmentProblem where the runner has another version of this package, or one in another place."""
    here = of_this_process()
    if dict(runner) != here:
        raise EnvironmentProblem(
            f"The runner has nemo-minitron {runner.get('version')} and a rank has {here['version']}.",
            where=f"runner: {runner.get('package')}; rank: {here['package']}, by {sys.executable}",
            next_step="Install one version on all nodes, and take other copies off PYTHONPATH.",
        )
