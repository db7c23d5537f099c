"""The Python environment of NeMo-Aligner: that of a container, or a virtual environment that this module makes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.processes.same_code import SAFE_PATH
from nemo_minitron.system.files import cache_dir
from nemo_minitron.system.outer_job import without_outer_job
from nemo_minitron.system.places import CONSTRAINTS, shipped_dir
from nemo_minitron.system.progress import Progress

ENTRY = Path(__file__).with_name("entry")
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
LOCK = REQUIREMENTS.with_suffix(".lock")
"""The pins of REQUIREMENTS with the sha256 of their files."""
SUPPORTED_PYTHONS = ((3, 10), (3, 11))
"""Versions for which nemo_toolkit 2.1.0 and its pins have wheels."""
PYTHON_VARIABLE = "MINITRON_ALIGNER_PYTHON"
READY_FILE = "minitron_ready.json"
SUPPORTED_ALIGNER = "0.7.0"


def aligner_python() -> Path:
    """Return the Python with NeMo-Aligner: that of MINITRON_ALIGNER_PYTHON, this one, or that of `make_environment`.

    Raises:
        EnvironmentProblem: NeMo-Aligner is not installed, or the variable names a file that does not exist.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise EnvironmentProblem(f"{PYTHON_VARIABLE} names a Python that does not exist.", where=named)
        return Path(named)
    if is_installed_here():
        return Path(sys.executable)
    if is_ready():
        return _python(environment_dir())
    raise EnvironmentProblem(
        "NeMo-Aligner is not installed. It needs its own environment, as it uses another version of Megatron-Core.",
        allowed=f"a container with NeMo-Aligner {SUPPORTED_ALIGNER}, or the environment at {environment_dir()}",
        next_step="minitron env aligner    installs it: about 3 minutes and 2.3 GB",
    )


def environment_of(python: Path) -> dict[str, str]:
    """Return the variables that processes of `python` need in addition to those of this process.

    This Python keeps PYTHONPATH, because a container may find NeMo and Megatron through it. For any other Python the
    variables that were set for this package are cleared.
    """
    return {} if _is_this(python) else {"PYTHONPATH": "", "PYTHONHOME": ""}


def _is_this(python: Path) -> bool:
    """Return whether a path names the running interpreter. Links are not followed: in a venv, python is a link."""
    return os.path.abspath(python) == os.path.abspath(sys.executable)


@cache
def has_gpu_kernels(python: Path) -> bool:
    """Return whether `python` has Apex and Transformer Engine, which NeMo needs to train on a GPU."""
    # `-c` puts an empty entry first, which stands for the working folder.
    look = (
        "import sys; sys.path[:] = filter(None, sys.path); import importlib.util as u; "
        "sys.exit(not all(map(u.find_spec, ('apex', 'transformer_engine'))))"
    )
    environment = {**os.environ, **environment_of(python), **SAFE_PATH}
    return subprocess.run([str(python), "-c", look], env=environment, capture_output=True, check=False).returncode == 0


def require_gpu_kernels() -> None:
    """Raise EnvironmentProblem if the Python with NeMo-Aligner cannot train on a GPU."""
    python = aligner_python()
    if not has_gpu_kernels(python):
        raise EnvironmentProblem(
            "This machine has a GPU, but NeMo-Aligner's environment lacks Apex or Transformer Engine, "
            "which NeMo needs on a GPU.",
            where=str(python),
            allowed="the aligner image of the Dockerfile (execution.cluster.container.aligner_image)",
            next_step="Run this stage in that image (docs/how-to/cluster.md), or on the CPU: execution.device=cpu",
        )


def is_installed_here() -> bool:
    """Return whether this Python has NeMo-Aligner, as in a container."""
    return importlib.util.find_spec("nemo_aligner") is not None


def versions_installed() -> dict[str, str]:
    """Run the self-test with this Python; returns the versions of its packages.

    Raises:
        EnvironmentProblem: the test failed, or NeMo-Aligner has an unsupported version.
    """
    log = environment_dir().with_name("aligner-installed.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    return self_test(Path(sys.executable), log)


def environment_dir() -> Path:
    """Return the folder of the environment; its name contains a hash of the requirements."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + torch_requirement().encode()).hexdigest()[:8]
    return cache_dir() / f"aligner-{digest}"


def is_ready() -> bool:
    """Return whether the environment is complete and has passed its self-test."""
    return (environment_dir() / READY_FILE).is_file()


def make_environment(
    progress: Progress,
    *,
    torch_index_url: str | None = None,
    find_links: Sequence[Path] = (),
    again: bool = False,
) -> Path:
    """Install NeMo-Aligner beside this package, test it, and return its folder.

    Args:
        torch_index_url: index with the build of torch that the machine needs; None: pip's default index.
        find_links: folders of wheels to install from, without an index; empty: install from the indexes.
        again: remove an existing environment first.

    Raises:
        EnvironmentProblem: there is no supported Python or no such folder, or pip or the self-test failed.
    """
    folder = environment_dir()
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    if is_ready():
        return folder
    missing = [str(links) for links in find_links if not links.is_dir()]
    if missing:
        raise EnvironmentProblem(f"--find-links: {', '.join(missing)}: no such folder.")
    base = _base_python()
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    # A virtual environment holds its own path, so it is not renamed when complete: READY_FILE marks it as complete.
    shutil.rmtree(folder, ignore_errors=True)
    steps = [
        ("new environment", [base, "-I", "-m", "venv", str(folder)]),
        *_installations(_python(folder), torch_index_url, find_links),
    ]
    for name, command in progress.track(steps, "aligner environment", len(steps), "steps"):
        progress.say(name)
        _run(command, log, name)
    progress.say("self-test")
    versions = self_test(_python(folder), log)
    (folder / READY_FILE).write_text(json.dumps(versions, indent=2))
    return folder


def _installations(
    python: Path, torch_index_url: str | None, find_links: Sequence[Path]
) -> Iterator[tuple[str, list[str]]]:
    """Yield (description, pip command). Files that a lock file or a bundle's list names must have the listed hash."""
    pip = [str(python), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    hashed = [*pip, "--no-deps", "--require-hashes"]
    what = "NeMo-Aligner and its dependencies"
    if not find_links:
        build = shipped_dir(CONSTRAINTS) / "build.lock"
        yield "build dependencies", [*hashed, "-r", str(build)]
        yield what, [*hashed, "--no-build-isolation", "--use-pep517", "-r", str(LOCK)]
        # The user chooses the build of torch, so its hash is not known. Its dependencies are installed by now.
        index = ["--index-url", torch_index_url] if torch_index_url else []
        yield torch_requirement(), [*pip, *index, "-c", str(REQUIREMENTS), torch_requirement()]
        return
    folders = ["--no-index", *(f"--find-links={links.absolute()}" for links in find_links)]
    listed = find_links[0] / "requirements.txt"
    if listed.is_file():
        yield what, [*hashed, *folders, "--only-binary=:all:", "-r", str(listed)]
        return
    # The folders hold wheels of unknown hashes, collected or built by the user.
    yield torch_requirement(), [*pip, *folders, torch_requirement()]
    yield what, [*pip, *folders, "--no-deps", "-r", str(REQUIREMENTS)]


def self_test(python: Path, log: Path) -> dict[str, str]:
    """Import with `python` all that the tasks import; returns the versions of the main packages.

    Raises:
        EnvironmentProblem: an import failed, or NeMo-Aligner has an unsupported version.
    """
    work = log.with_name(f"self-test-{os.getpid()}-{time.time_ns()}")
    work.mkdir(parents=True)
    try:
        (work / "task.json").write_text(json.dumps({"task": "self_test", "work_dir": str(work)}))
        _run(
            [str(python), str(ENTRY), str(work / "task.json")],
            log,
            "self-test",
            {**environment_of(python), **SAFE_PATH},
        )
        versions: dict[str, str] = json.loads((work / "result.json").read_text())["versions"]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not versions["nemo-aligner"].startswith(SUPPORTED_ALIGNER):
        raise EnvironmentProblem(
            f"NeMo-Aligner {versions['nemo-aligner']} is installed.", where=str(python), allowed=SUPPORTED_ALIGNER
        )
    return versions


def torch_requirement() -> str:
    """Return the requirement for the same version of torch as in this environment."""
    return f"torch=={version('torch').split('+')[0]}"


def _base_python() -> str:
    """Return a Python of a supported version: this one, or one on the PATH."""
    names = [f"python{major}.{minor}" for major, minor in reversed(SUPPORTED_PYTHONS)]
    if sys.version_info[:2] in SUPPORTED_PYTHONS:
        return sys.executable
    for name in names:
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    raise EnvironmentProblem(
        f"NeMo-Aligner {SUPPORTED_ALIGNER} needs Python 3.10 or 3.11; this is {sys.version.split()[0]}.",
        allowed=" or ".join(names) + " on the PATH",
        next_step="Install one of them; this package can keep its own Python.",
    )


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _run(command: list[str], log: Path, what: str, environment: Mapping[str, str] | None = None) -> None:
    own = {**without_outer_job(os.environ), **(environment or {})}
    with log.open("a") as file:
        code = subprocess.run(command, env=own, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise EnvironmentProblem(
            f"The aligner environment could not be made: {what} ended with code {code}: {' '.join(last)[:300]}",
            where=str(log),
            next_step="Read the log, then repeat the command.",
        )
