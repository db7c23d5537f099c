"""Examination of this machine for `minitron doctor`: everything that the stages can use.

It changes nothing, and a check that fails becomes a finding.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from nemo_minitron.system.cores import usable_cores, usable_memory_bytes
from nemo_minitron.system.tested_versions import TESTED, level_of

Level = Literal["ok", "newer", "missing", "problem"]
"""Result of a check. `newer`: newer than the tested versions, which is only a warning."""
TIMEOUT_S, WRITTEN_MIB = 20.0, 64
_SHOWN_CHARS = 200
ONLY_ALIGNER = (
    "this Python has NeMo-Aligner and is for its stages; another one, such as the core image, is for the rest"
)
NO_PROGRAM = 127
"""Exit code of shells for a program that does not exist or cannot be executed."""
# The working folder is removed from the import path, because it may contain a file torch.py.
TORCH_ON_GPUS = """
import sys
sys.path[:] = [folder for folder in sys.path if folder]
import torch
sees = torch.cuda.is_available()
print(sees, "CUDA", torch.version.cuda, "NCCL", torch.cuda.nccl.version() if sees else None)
"""


@dataclass(frozen=True)
class Finding:
    """Result of one check, a line of the table; `group` is a name for --require."""

    group: str
    what: str
    level: Level
    text: str
    next_step: str = ""


def examine(run_root: Path) -> list[Finding]:
    """Run all checks in the order of the table. A check that raises becomes a finding."""
    probes: tuple[Callable[[], Iterator[Finding]], ...] = (
        _machine,
        lambda: _disk(run_root),
        _core,
        _gpus,
        _aligner,
        _slurm,
        _containers,
    )
    found: list[Finding] = []
    for probe in probes:
        try:
            found += probe()
        except Exception as error:
            found.append(Finding("core", "probe", "problem", f"{type(error).__name__}: {error}"))
    return found


def failures(found: Sequence[Finding], required: Sequence[str]) -> list[Finding]:
    """List the findings that prevent the core from running, and what is missing from the required groups."""
    groups = set(required)
    return [one for one in found if one.level == "problem" or (one.group in groups and one.level == "missing")]


def _version_finding(name: str, found: str, text: str) -> Finding:
    oldest, newest = TESTED[name]
    level = level_of(name, found)
    steps: dict[Level, str] = {
        "newer": f"newer than tested ({oldest} to {newest}); if something fails, try {newest} first",
        "problem": f"too old: {oldest} or newer, tested up to {newest}",
    }
    return Finding("core", name, level, text, steps.get(level, ""))


def _machine() -> Iterator[Finding]:
    python = platform.python_version()
    yield _version_finding("python", python, f"{python} ({sys.executable})")
    memory_gib = usable_memory_bytes() / 2**30
    yield Finding(
        "core", "machine", "ok", f"{usable_cores()} cores, {memory_gib:.1f} GiB of memory, {platform.platform()}"
    )


def _disk(run_root: Path) -> Iterator[Finding]:
    folder = next(path for path in (run_root.absolute(), *run_root.absolute().parents) if path.is_dir())
    free_gib = shutil.disk_usage(folder).free / 2**30
    if not os.access(folder, os.W_OK):
        yield Finding("core", "disk", "problem", f"{folder} is not writable", "set execution.run_root")
        return
    block, started_s = os.urandom(2**20), time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".minitron-doctor-") as file:
        for _ in range(WRITTEN_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = WRITTEN_MIB / (time.monotonic() - started_s)
    yield Finding("core", "disk", "ok", f"{free_gib:.1f} GiB free in {folder}, writes at {rate:,.0f} MiB/s")


def _core() -> Iterator[Finding]:
    """Check the core packages. The Python of an image for NeMo-Aligner has older ones, and runs only its stages."""
    from nemo_minitron.backends.alignment.nemo_aligner.environment import is_installed_here

    is_for_aligner = is_installed_here()
    for found in _core_packages():
        is_expected = is_for_aligner and found.level == "problem"
        yield replace(found, level="missing", next_step=ONLY_ALIGNER) if is_expected else found
    yield from _extras()


def _core_packages() -> Iterator[Finding]:
    for name in ("torch", "megatron-core", "transformers"):
        found = _version(name)
        if found is not None:
            yield _version_finding(name, found, found)
        elif name == "megatron-core" and (folder := _megatron_on_path()):
            yield Finding("core", name, "ok", f"{folder} (not an installed package, so its version is not checked)")
        else:
            yield Finding("core", name, "problem", "not installed", "make install, or pip install nemo-minitron")


def _extras() -> Iterator[Finding]:
    for name, use in (("transformer-engine", "faster layers on a GPU"), ("apex", "a faster optimizer on a GPU")):
        found = _version(name)
        yield Finding("gpu-extras", name, "ok" if found else "missing", found or f"not installed: {use}")
    found = _version("lm-eval")
    text = found or "not installed: tasks and instructions of evaluations, layer scores by a task"
    yield Finding("eval", "lm-eval", "ok" if found else "missing", text, "pip install 'nemo-minitron[eval]'")


def _gpus() -> Iterator[Finding]:
    code, out = _run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    if code == NO_PROGRAM:
        yield Finding("gpu", "GPUs", "missing", "no nvidia-smi: training runs on the CPU", "in docker: --gpus all")
        return
    if code:
        text = f"nvidia-smi failed: {_reason(out, code)}"
        yield Finding("gpu", "GPUs", "missing", text, "repair the driver; until then, training runs on the CPU")
        return
    cards = [line.strip() for line in out.splitlines() if line.strip()]
    yield Finding("gpu", "GPUs", "ok" if cards else "missing", "; ".join(cards) or "nvidia-smi lists no GPU")
    code, out = _run([sys.executable, "-c", TORCH_ON_GPUS])
    is_usable = code == 0 and out.startswith("True")
    yield Finding(
        "gpu",
        "torch on GPUs",
        "ok" if is_usable else "problem",
        out.strip() if is_usable else f"torch cannot use a GPU: {out.strip()[-_SHOWN_CHARS:]}",
        "" if is_usable else "install the CUDA build of torch that fits the driver",
    )


def _aligner() -> Iterator[Finding]:
    from nemo_minitron.backends.alignment.nemo_aligner.environment import SUPPORTED_ALIGNER, aligner_python
    from nemo_minitron.errors import MinitronError

    try:
        python = aligner_python()
    except MinitronError as error:
        yield Finding("aligner", "NeMo-Aligner", "missing", error.what, "minitron env aligner")
        return
    yield Finding("aligner", "NeMo-Aligner", "ok", f"{SUPPORTED_ALIGNER} in {python}")


def _slurm() -> Iterator[Finding]:
    code, out = _run(["sbatch", "--version"])
    if code:
        text = "no sbatch here" if code == NO_PROGRAM else f"sbatch failed: {_reason(out, code)}"
        yield Finding("slurm", "Slurm", "missing", text, "on a login node: minitron launch launcher=slurm")
        return
    from nemo_minitron.launch.slurm.answers import PARTITIONS, has_pyxis, lines_of, partitions

    _, sinfo = _run([*PARTITIONS])
    names = ", ".join(sorted(partitions(sinfo))) or "none"
    yield Finding("slurm", "Slurm", "ok", f"{(lines_of(out) or ['?'])[-1]}; partitions: {names}")
    _, text = _run(["srun", "--help"])
    has = has_pyxis(text)
    yield Finding(
        "pyxis", "pyxis", "ok" if has else "missing", "srun has --container-image" if has else "not installed"
    )


def _containers() -> Iterator[Finding]:
    for name in ("docker", "enroot", "apptainer", "singularity"):
        path = shutil.which(name)
        if path is None:
            yield Finding(name, name, "missing", "not installed")
            continue
        code, out = _run([name, "version"] if name == "enroot" else [name, "--version"])
        yield Finding(
            name, name, "ok" if code == 0 else "missing", out.strip().splitlines()[0] if out.strip() else path
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _megatron_on_path() -> Path | None:
    """Return the folder of Megatron-Core if it can be imported; some containers only extend PYTHONPATH."""
    spec = find_spec("megatron")
    places = (Path(place, "core") for place in (spec and spec.submodule_search_locations) or ())
    return next((place for place in places if (place / "package_info.py").is_file()), None)


def _reason(out: str, code: int) -> str:
    """Return the end of the output of a program that failed, where most programs state the reason."""
    return " ".join(out.split())[-_SHOWN_CHARS:] or f"exit code {code}"


def _run(command: list[str]) -> tuple[int, str]:
    """Run a program, and return its exit code (NO_PROGRAM: there is none; 124: timeout) and its output."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (FileNotFoundError, PermissionError):
        return NO_PROGRAM, ""
    except subprocess.TimeoutExpired:
        return 124, f"no response within {TIMEOUT_S:.0f} s"
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")
