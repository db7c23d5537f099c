"""Wheels of an environment, made by pip once and kept in the cache.

`pip wheel`, not `pip download`: some dependencies have no wheel on PyPI and are built here, so that a machine without
a network installs files only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from nemo_minitron.backends.aligner.environment import REQUIREMENTS, SUPPORTED_PYTHONS, torch_requirement
from nemo_minitron.bundle.archive import MEMBER_TIME_S
from nemo_minitron.config.places import CONFIGS, RECIPES
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.files import cache_dir
from nemo_minitron.progress import Progress

CHECKOUT = Path(__file__).resolve().parents[2]
CONSTRAINTS = CHECKOUT / "constraints" / "core.txt"
_PROJECT, _PACKAGE = "pyproject.toml", "nemo_minitron"
EXTRA = "eval"


def target() -> dict[str, str]:
    """What the wheels are for: a machine like this one."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"system": platform.system(), "machine": platform.machine(), "python": python}


def core_wheels(torch_index_url: str | None, progress: Progress) -> list[Path]:
    """This package with the extra `eval` and all that it needs, by the pins of constraints/core.txt.

    Raises:
        EnvironmentProblem: not in a checkout, or pip failed.
    """
    _require_checkout()
    pins = CONSTRAINTS.read_text() + (CHECKOUT / _PROJECT).read_text()

    def fill(folder: Path, scratch: Path) -> None:
        torch, links = torch_requirement(), list[str]()
        if torch_index_url is not None:
            # By itself, so that the index chosen for it serves nothing else.
            _pip_wheel(scratch / "torch", ["--index-url", torch_index_url, torch], scratch, progress)
            torch = f"torch=={versions_of((scratch / 'torch').glob('*.whl'))['torch']}"
            links = [f"--find-links={scratch / 'torch'}"]
        wanted = [f"--constraint={CONSTRAINTS}", torch, f"{_source(scratch)}[{EXTRA}]"]
        _pip_wheel(folder, [*links, *wanted], scratch, progress)
        for own in folder.glob(f"{_PACKAGE}-*.whl"):
            own.unlink()

    kept = _kept("core", [pins, torch_requirement(), torch_index_url or ""], fill, progress)
    return sorted(kept.glob("*.whl"))


def aligner_wheels(progress: Progress) -> list[Path]:
    """NeMo-Aligner and what it needs, without torch, which is the core's.

    Raises:
        EnvironmentProblem: this Python is not one of NeMo-Aligner's, or pip failed.
    """
    if sys.version_info[:2] not in SUPPORTED_PYTHONS:
        allowed = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED_PYTHONS)
        raise EnvironmentProblem(f"--aligner: NeMo-Aligner has no wheels for {_here()}.", allowed=f"Python {allowed}")

    def fill(folder: Path, scratch: Path) -> None:
        _pip_wheel(folder, ["--no-deps", "--requirement", str(REQUIREMENTS)], scratch, progress)

    return sorted(_kept("aligner", [REQUIREMENTS.read_text()], fill, progress).glob("*.whl"))


@contextmanager
def own_wheel(progress: Progress) -> Iterator[Path]:
    """The wheel of this package as it is now, for the duration.

    Raises:
        EnvironmentProblem: not in a checkout, or pip failed.
    """
    _require_checkout()
    with _scratch() as scratch:
        _pip_wheel(scratch / "own", ["--no-deps", str(_source(scratch))], scratch, progress)
        (wheel,) = (scratch / "own").glob("*.whl")
        yield wheel


def versions_of(wheels: Iterator[Path] | Sequence[Path]) -> dict[str, str]:
    """Package -> version, from the names of the files."""
    return dict(file.name.split("-")[:2] for file in wheels)


def warnings_about(wheels: Sequence[Path]) -> Iterator[str]:
    """What may surprise on the other machine."""
    for file in wheels:
        if file.stem.split("-")[-1].startswith("linux_"):
            yield (
                f"{file.name} was compiled here, as there is no wheel of it for {_here()}: it needs a C library "
                "at least as new as this machine's."
            )
    bundled, here = versions_of(wheels)["torch"], version("torch")
    if bundled != here:
        yield f"torch here is {here}, in the bundle {bundled}: --torch-index-url chooses the build."


def _here() -> str:
    return "{system} {machine}, Python {python}".format(**target())


def _require_checkout() -> None:
    if not CONSTRAINTS.is_file() or not (CHECKOUT / _PROJECT).is_file():
        raise EnvironmentProblem(
            "Wheels are made from a checkout of nemo-minitron, and this one is installed without it.",
            where=str(CHECKOUT),
            next_step="Clone the repository and `pip install -e .` there; or --no-wheels.",
        )
    if importlib.util.find_spec("pip") is None:
        raise EnvironmentProblem("This Python has no pip.", next_step=f"{sys.executable} -m ensurepip")


def _source(scratch: Path) -> Path:
    """A copy of what the wheel is made of: setuptools leaves its work beside its source."""
    folder = scratch / "source"
    if not folder.exists():
        hide = shutil.ignore_patterns("__pycache__")
        for name in (_PACKAGE, RECIPES, CONFIGS):
            shutil.copytree(CHECKOUT / name, folder / name, ignore=hide)
        for name in (_PROJECT, "setup.py", "README.md", "LICENSE"):
            shutil.copyfile(CHECKOUT / name, folder / name)
    return folder


def _kept(name: str, made_from: Sequence[str], fill: Callable[[Path, Path], None], progress: Progress) -> Path:
    """A folder of the cache, filled once: its name changes with what it is made from, and it is there when whole.

    Args:
        fill: fill(empty folder, scratch folder).
    """
    digest = hashlib.sha256("\0".join([*made_from, *target().values()]).encode()).hexdigest()[:12]
    folder = cache_dir() / "wheels" / f"{name}-{digest}"
    if folder.is_dir():
        progress.say(f"{name} wheels: kept from before in {folder}")
        return folder
    progress.say(f"{name} wheels: collected into {folder}, once")
    with _scratch() as scratch:
        partial = scratch / "wheels"
        fill(partial, scratch)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            partial.rename(folder)
    return folder


@contextmanager
def _scratch() -> Iterator[Path]:
    """In the cache, so that one disk needs the room and not /tmp too."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".wheels-") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise EnvironmentProblem(
            f"Wheels cannot be kept: {error}", where=str(cache_dir()), next_step="XDG_CACHE_HOME names another folder."
        ) from error


def _pip_wheel(folder: Path, wanted: Sequence[str], scratch: Path, progress: Progress) -> None:
    """pip shows its own progress."""
    log = scratch / "pip.log"
    command = [sys.executable, "-Im", "pip", "wheel", "--no-input", "--disable-pip-version-check"]
    command += [] if progress.console.is_terminal and not progress.silent else ["--quiet"]
    command += [f"--log={log}", f"--wheel-dir={folder}", *wanted]
    environment = {**os.environ, "TMPDIR": str(scratch), "SOURCE_DATE_EPOCH": str(MEMBER_TIME_S)}
    code = subprocess.run(command, stdout=sys.stderr, env=environment, check=False).returncode
    if code:
        raise _pip_error(log.read_text(errors="replace") if log.is_file() else "")


def _pip_error(log: str) -> EnvironmentProblem:
    lines = [line.split("ERROR: ", 1)[1] for line in log.splitlines() if "ERROR: " in line]
    lost = [line.removeprefix("No matching distribution found for ") for line in lines if "No matching dist" in line]
    if lost:
        return EnvironmentProblem(
            f"pip finds no file of {lost[-1]} for {_here()}.",
            next_step="Check the network and pip's indexes (`pip config list`); perhaps this platform has none.",
        )
    return EnvironmentProblem(
        f"pip could not make the wheels: {(lines or ['no reason given'])[-1]}",
        next_step="The lines above say more. Check the network and the room on the disk, then run it again.",
    )
