"""Wheels of an environment, built once by pip and kept in the cache.

This uses `pip wheel`, not `pip download`: dependencies without a wheel on PyPI are built here, so that a machine
without a network only has to install files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from nemo_minitron.artifacts.manifest import sha256_of
from nemo_minitron.backends.alignment.nemo_aligner.environment import LOCK, SUPPORTED_PYTHONS, torch_requirement
from nemo_minitron.bundle.archive import MEMBER_TIME_S
from nemo_minitron.bundle.own_wheel import write_own_wheel
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.files import cache_dir
from nemo_minitron.system.places import CONSTRAINTS, shipped_dir
from nemo_minitron.system.progress import Progress

LIST_FILE = "requirements.txt"
"""File in each folder of wheels that lists them with their sha256, for `pip install --require-hashes`."""


def target() -> dict[str, str]:
    """Return the platform that the wheels are for, which is that of this machine."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"system": platform.system(), "machine": platform.machine(), "python": python}


def core_wheels(torch_index_url: str | None, progress: Progress) -> list[Path]:
    """Return the wheels for this package with the extra `eval`: those pinned in constraints/newest.lock, and torch.

    Raises:
        EnvironmentProblem: pip is missing or failed.
    """
    _require_pip()
    lock, pins = (shipped_dir(CONSTRAINTS) / name for name in ("newest.lock", "newest.txt"))

    def fill(folder: Path, scratch: Path) -> None:
        _pip_wheel(folder, ["--no-deps", "--require-hashes", f"--requirement={lock}"], scratch, progress)
        # Separate, so that the index chosen for torch is used for nothing else. The user chooses the build of torch,
        # so its hash is not known in advance.
        chosen = ["--index-url", torch_index_url] if torch_index_url else [f"--constraint={pins}"]
        _pip_wheel(scratch / "torch", [*chosen, torch_requirement()], scratch, progress)
        have = {_normalized(name) for name in versions_of(folder.glob("*.whl"))}
        for file in (scratch / "torch").glob("*.whl"):
            if _normalized(file.name.split("-")[0]) not in have:
                file.rename(folder / file.name)

    made_from = [file.read_text() for file in (lock, pins)]
    return sorted(
        _cached("core", [*made_from, torch_requirement(), torch_index_url or ""], fill, progress).glob("*.whl")
    )


def aligner_wheels(progress: Progress) -> list[Path]:
    """Return the wheels of NeMo-Aligner and its dependencies, without torch, which is among the core wheels.

    Raises:
        EnvironmentProblem: NeMo-Aligner does not support this Python, or pip failed.
    """
    if sys.version_info[:2] not in SUPPORTED_PYTHONS:
        allowed = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED_PYTHONS)
        raise EnvironmentProblem(
            f"--aligner: NeMo-Aligner has no wheels for {_platform()}.", allowed=f"Python {allowed}"
        )

    _require_pip()

    def fill(folder: Path, scratch: Path) -> None:
        _pip_wheel(folder, ["--no-deps", "--require-hashes", f"--requirement={LOCK}"], scratch, progress)

    return sorted(_cached("aligner", [LOCK.read_text()], fill, progress).glob("*.whl"))


@contextmanager
def own_wheel() -> Iterator[Path]:
    """Provide a temporary wheel of this package in its current state.

    Raises:
        EnvironmentProblem: see `write_own_wheel`.
    """
    with _scratch() as scratch:
        yield write_own_wheel(scratch)


def list_of(wheels: Sequence[Path]) -> bytes:
    """Return the content of LIST_FILE for these wheels."""
    named = sorted((*file.name.split("-")[:2], sha256_of(file)) for file in wheels)
    return "".join(f"{name}=={version} --hash=sha256:{digest}\n" for name, version, digest in named).encode()


def torch_only_wheels(core: Sequence[Path]) -> list[Path]:
    """Return torch and the wheels that only torch requires: those core wheels that are not in newest.lock."""
    lock = (shipped_dir(CONSTRAINTS) / "newest.lock").read_text()
    elsewhere = {_normalized(line.split("==")[0]) for line in lock.splitlines() if "==" in line} | {"nemo-minitron"}
    return [file for file in core if _normalized(file.name.split("-")[0]) not in elsewhere]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions_of(wheels: Iterator[Path] | Sequence[Path]) -> dict[str, str]:
    """Return {package: version} from the file names."""
    return dict(file.name.split("-")[:2] for file in wheels)


def warnings_about(wheels: Sequence[Path]) -> Iterator[str]:
    """Yield warnings about wheels that may not work as expected on the other machine."""
    for file in wheels:
        if file.stem.split("-")[-1].startswith("linux_"):
            yield (
                f"{file.name} was compiled here, because there is no wheel of it for {_platform()}; "
                "it needs a C library at least as new as that of this machine."
            )
    bundled, here = versions_of(wheels)["torch"], version("torch")
    if bundled != here:
        yield f"torch is {here} here and {bundled} in the bundle; --torch-index-url chooses the build."


def _platform() -> str:
    return "{system} {machine}, Python {python}".format(**target())


def _require_pip() -> None:
    if importlib.util.find_spec("pip") is None:
        raise EnvironmentProblem("This Python has no pip.", next_step=f"Run `{sys.executable} -m ensurepip`.")


def _cached(name: str, made_from: Sequence[str], fill: Callable[[Path, Path], None], progress: Progress) -> Path:
    """Return a folder of the cache that `fill` filled once; its name depends on `made_from` and on the platform.

    The folder exists only when it is complete.

    Args:
        fill: fill(empty folder, scratch folder) writes the wheels.
    """
    digest = hashlib.sha256("\0".join([*made_from, *target().values()]).encode()).hexdigest()[:12]
    folder = cache_dir() / "wheels" / f"{name}-{digest}"
    if folder.is_dir():
        progress.say(f"{name} wheels: already in {folder}")
        return folder
    progress.say(f"{name} wheels: collecting into {folder} for this and later bundles")
    with _scratch() as scratch:
        partial = scratch / "wheels"
        fill(partial, scratch)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            partial.rename(folder)
    return folder


@contextmanager
def _scratch() -> Iterator[Path]:
    """Provide a temporary folder in the cache, so that /tmp needs no space."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".wheels-") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise EnvironmentProblem(
            f"The cache of wheels cannot be written: {error}",
            where=str(cache_dir()),
            next_step="Set XDG_CACHE_HOME to another folder.",
        ) from error


def _pip_wheel(folder: Path, wanted: Sequence[str], scratch: Path, progress: Progress) -> None:
    """Run `pip wheel`, which shows its own progress; raise EnvironmentProblem if it fails."""
    log = scratch / "pip.log"
    command = [sys.executable, "-I", "-m", "pip", "wheel", "--no-input", "--disable-pip-version-check"]
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
            f"pip finds no file of {lost[-1]} for {_platform()}.",
            next_step="Check the network and pip's indexes (`pip config list`); this platform may not be supported.",
        )
    return EnvironmentProblem(
        f"pip could not build the wheels: {(lines or ['no reason given'])[-1]}",
        next_step="See the lines above for details. Check the network and the free disk space, then run it again.",
    )
