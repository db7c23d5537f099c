"""The installed package: a wheel in a virtual environment, without the checkout and without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.conftest import REPO

SOURCES = ("nemo_minitron", "configs", "constraints", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE")
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]


def copy_of_the_sources(folder: Path) -> Path:
    """Copy the sources of a wheel out of the checkout, because setuptools leaves its work in the source folder."""
    for name in SOURCES:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / name)
    return folder


def make_sdist(source: Path, out: Path) -> Path:
    """Build the source archive."""
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    must([sys.executable, "-c", code], cwd=source)
    (archive,) = out.iterdir()
    return archive


def make_wheel(source: Path, out: Path) -> Path:
    """Build the wheel of a folder or a source archive."""
    must([sys.executable, "-m", "pip", "wheel", *OFFLINE, f"--wheel-dir={out}", str(source)], cwd=out.parent)
    (wheel,) = out.iterdir()
    return wheel


def venv_with(folder: Path, *install: str) -> Path:
    """Return the bin folder of a new environment with this one's packages and nemo-minitron installed by pip."""
    must([sys.executable, "-m", "venv", "--without-pip", str(folder)], cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    # A line in a .pth file adds only the folder, not the editable install whose .pth file is in it.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin/python")
    must([sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, *install], cwd=folder.parent)
    return folder / "bin"


def must(words: list[str], cwd: Path, **variables: str) -> str:
    """Return the output of a command that must succeed, without paths of the checkout in its environment."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
