"""Assurance that runner and ranks run the same code: the way ranks are started, and the comparison of versions."""

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
"""Folder that Python runs to start a process without the working directory on its import path."""
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Environment variable that, from Python 3.11 on, has the same effect in the children of those processes."""


@contextmanager
def safe_path_of_children() -> Iterator[None]:
    """In this context, processes started by Python's multiprocessing do not import from the working directory."""
    kept = {name: os.environ.get(name) for name in SAFE_PATH}
    util: Any = multiprocessing.util
    options = util._args_from_interpreter_flags
    os.environ.update(SAFE_PATH)
    if sys.version_info < (3, 11):
        # multiprocessing passes this process's options to its children; add -I. A worker still finds all packages,
        # because it takes over this process's import path before it imports anything but the standard library.
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
    """Return the version and the location of the package in this process."""
    return {"version": nemo_minitron.__version__, "package": str(Path(nemo_minitron.__file__).resolve().parent)}


def require_same(runner: Mapping[str, str]) -> None:
    """Raise EnvironmentProblem if the runner uses another version of this package or one at another location."""
    here = of_this_process()
    if dict(runner) != here:
        raise EnvironmentProblem(
            f"The runner has nemo-minitron {runner.get('version')} and a rank has {here['version']}.",
            where=f"runner: {runner.get('package')}; rank: {here['package']}, by {sys.executable}",
            next_step="Install the same version on all nodes, and remove other copies from PYTHONPATH.",
        )
