"""Write the constraint files and the lock files (`make lock`). It needs uv and network access.

Two sets of versions are pinned: `newest.txt` has the newest compatible versions for each Python, and `oldest.txt` the
oldest versions that pyproject.toml allows, on Python 3.10. Pins that are still valid are kept; `make lock UPGRADE=1`
upgrades them. torch is pinned manually in `torch-newest.txt` and `torch-oldest.txt`, because its build depends on the
machine. The pins of NeMo-Aligner in `nemo_minitron/backends/alignment/nemo_aligner/requirements.txt` are also chosen
manually. A lock file adds the sha256 of all files on PyPI to each pin. The command stops if a pin has no file for a
supported Python.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from setuptools.config.pyprojecttoml import read_configuration

HERE = Path(__file__).parent
ROOT = HERE.parent
PROJECT = ROOT / "pyproject.toml"
ALIGNER = ROOT / "nemo_minitron/backends/alignment/nemo_aligner/requirements.txt"
BUILD = ("setuptools",)
"""Packages that must be installed before packages without a wheel can be built."""
NO_DEPENDENCIES = ("megatron-core",)
"""Packages in the oldest set without their dependencies: old versions require unused test tools and ModelOpt."""
BY_TORCH = ("torch", "triton", "nvidia-", "cuda-")
"""Prefixes of the packages that a build of torch determines, so that they are not pinned here."""
MADE = "# Made by `make lock` from {}: do not edit.\n"
UV = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
UNIVERSAL = ["--universal", "--python-version=3.10"]
OLDEST_PYTHON = ["--python-version=3.10", "--python-platform=linux"]


def main() -> None:
    """Write all constraint and lock files."""
    upgrade = ["--upgrade"] if "--upgrade" in sys.argv[1:] else []
    newest, oldest = HERE / "newest.txt", HERE / "oldest.txt"
    write(newest, pins_of(newest_set(newest, upgrade)), "pyproject.toml")
    needed = set(names(compiled([str(PROJECT), "--extra=eval", f"--constraint={newest}"])))
    core, dev, build = list[str](), list[str](), list[str]()
    for entry in entries(hashed(newest)):
        (name,) = names(entry)
        (build if name in BUILD else core if name in needed else dev).append(entry)
    write(HERE / "build.lock", build, "constraints/newest.txt")
    write(HERE / "newest.lock", core, "constraints/newest.txt")
    write(HERE / "dev.lock", dev, "constraints/newest.txt")
    tools = {name for entry in (*dev, *build) for name in names(entry)}
    write(oldest, (line for line in pins_of(oldest_set()) if not tools & set(names(line))), "pyproject.toml")
    write(HERE / "oldest.lock", entries(hashed(oldest, OLDEST_PYTHON)), "constraints/oldest.txt")
    write(ALIGNER.with_suffix(".lock"), entries(hashed(ALIGNER)), str(ALIGNER.relative_to(ROOT)))


def newest_set(kept: Path, options: list[str]) -> str:
    """Resolve the newest versions for all supported Pythons, with markers. Valid versions in `kept` are preferred."""
    extras = ["--extra=eval", "--extra=dev", f"--constraint={HERE / 'torch-newest.txt'}"]
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / kept.name
        if kept.is_file():
            made.write_text(kept.read_text())
        compiled([str(PROJECT), *extras, f"--output-file={made}", *options])
        return made.read_text()


def oldest_set() -> str:
    """Resolve the oldest version that pyproject.toml allows of each dependency, on the oldest supported Python.

    The dependencies of the development tools are included, because dev.lock, which is installed in addition, does not
    contain packages that are in newest.lock.
    """
    project = read_configuration(PROJECT, expand=False)["project"]
    extras = project["optional-dependencies"]
    direct = [Requirement(text) for text in (*project["dependencies"], *extras["eval"])]
    pinned = {one.name: f"{str(one).removesuffix(str(one.specifier))}=={lowest(one)}" for one in direct}
    alone = [pinned.pop(name) for name in NO_DEPENDENCIES]
    return compiled(["-"], OLDEST_PYTHON, "\n".join([*pinned.values(), *extras["dev"]])) + "\n".join(alone)


def lowest(requirement: Requirement) -> str:
    """Return the lower bound of a requirement."""
    return next(one.version for one in requirement.specifier if one.operator in (">=", "=="))


def hashed(pins: Path, python: list[str] = UNIVERSAL) -> str:
    """Return the pins of a file with the hashes of all distribution files."""
    return compiled(["--no-deps", "--generate-hashes", str(pins)], python)


def compiled(words: list[str], python: list[str] = UNIVERSAL, given: str | None = None) -> str:
    """Run `uv pip compile`, and return its output; exit if it fails."""
    done = subprocess.run([*UV, *python, *words], stdout=subprocess.PIPE, text=True, check=False, input=given)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def pins_of(text: str) -> Iterator[str]:
    """Return the lines of a resolution without the packages that torch determines."""
    lines = (line for line in text.splitlines(keepends=True) if line.strip() and not line.startswith("#"))
    return (f"{line.rstrip()}\n" for line in sorted(lines) if not line.startswith(BY_TORCH))


def entries(text: str) -> Iterator[str]:
    """Yield the text of each package with its hashes."""
    for entry in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE):
        if entry.strip():
            yield entry


def names(text: str) -> list[str]:
    return re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)


def write(file: Path, found: Iterable[str], source: str) -> None:
    lines = list(found)
    file.write_text(MADE.format(source) + "".join(lines))
    print(f"{file.relative_to(ROOT)}: {len(lines)} pins")


if __name__ == "__main__":
    main()
