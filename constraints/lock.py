"""Writes the lock files: every pin with the sha256 of each of its files on PyPI. `make lock`; needs uv and a network.

Pins are chosen by hand, in constraints/core.txt and nemo_minitron/backends/aligner/requirements.txt; this adds hashes
only, and stops where a pin has no file for a supported version of Python.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent / "pyproject.toml"
PINS = HERE / "core.txt"
ALIGNER = HERE.parent / "nemo_minitron/backends/aligner/requirements.txt"
BUILD = ("setuptools",)
"""What packages without a wheel are built with: it has to be there before they are."""
HEADER = "# Made by `make lock` from {}: do not edit.\n"
UV = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version=3.10", "--no-header", "--no-annotate"]


def main() -> None:
    core, dev, build = list[str](), list[str](), list[str]()
    needed = set(names(compiled(str(PROJECT), "--extra=eval", f"--constraint={PINS}")))
    for entry in entries(compiled("--no-deps", "--generate-hashes", str(PINS))):
        (name,) = names(entry)
        (build if name in BUILD else core if name in needed else dev).append(entry)
    write(HERE / "build.lock", build, PINS)
    write(HERE / "core.lock", core, PINS)
    write(HERE / "dev.lock", dev, PINS)
    aligner = compiled("--no-deps", "--generate-hashes", str(ALIGNER))
    write(ALIGNER.with_suffix(".lock"), list(entries(aligner)), ALIGNER)


def compiled(*words: str) -> str:
    """What uv resolves."""
    done = subprocess.run([*UV, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def entries(text: str) -> Iterator[str]:
    """Each package with its hashes."""
    for entry in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE):
        if entry.strip():
            yield entry


def names(text: str) -> list[str]:
    return re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)


def write(file: Path, found: list[str], pins: Path) -> None:
    file.write_text(HEADER.format(pins.relative_to(HERE.parent)) + "".join(found))
    print(f"{file.relative_to(HERE.parent)}: {len(found)} pins")


if __name__ == "__main__":
    main()
