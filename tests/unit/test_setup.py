"""`make` installs the required versions, and the package contains all files that it needs at run time."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools.config.pyprojecttoml import read_configuration

REPO = Path(__file__).resolve().parents[2]
SETS = (("newest", "3.10"), ("newest", "3.11"), ("newest", "3.12"), ("newest", "3.13"), ("oldest", "3.10"))
"""Constraint file, and a Python that it is for."""


def project() -> dict[str, Any]:
    return read_configuration(REPO / "pyproject.toml", expand=False)["project"]


def pins(which: str, python: str) -> dict[str, Version]:
    """Return package -> version that a constraint file pins for a Python."""
    found: dict[str, Version] = {}
    for line in (REPO / "constraints" / f"{which}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = Version(str(requirement.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize(("which", "python"), SETS)
def test_every_dependency_is_pinned_within_its_range(which: str, python: str) -> None:
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["eval"]]
    if which == "newest":  # the tools are the same for both
        wanted += project()["optional-dependencies"]["dev"]
    pinned = pins(which, python) | pins(f"torch-{which}", python)
    for requirement in map(Requirement, wanted):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_the_oldest_set_is_the_lower_bounds() -> None:
    pinned = pins("oldest", "3.10") | pins("torch-oldest", "3.10")
    for requirement in map(Requirement, project()["dependencies"]):
        (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
        assert pinned[canonicalize_name(requirement.name)] == Version(bound), str(requirement)


def test_torch_is_pinned_by_itself_as_its_build_depends_on_the_machine() -> None:
    for which, python in SETS:
        assert pins(f"torch-{which}", python).keys() == {"torch"}
        assert not [name for name in pins(which, python) if name.startswith(("torch", "nvidia", "triton", "cuda"))]


def test_every_package_that_the_code_imports_is_declared() -> None:
    found = set()
    for file in (REPO / "nemo_minitron").rglob("*.py"):
        if "entry" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.split(".")[0] for name in names}
    foreign = found - set(sys.stdlib_module_names) - {"nemo_minitron"}
    named = [*project()["dependencies"], *chain(*project()["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(text).name) for text in named}
    packages = {"hydra": "hydra-core", "megatron": "megatron-core", "yaml": "pyyaml"}
    # CUDA builds of torch bring Triton; the module that imports it is only imported where there is a GPU.
    brought = {"triton"}
    assert {canonicalize_name(packages.get(name, name)) for name in foreign} - brought <= declared


def test_files_beside_the_code_are_in_the_wheel() -> None:
    """Every tracked file of the package that is no Python file matches a package-data pattern."""
    config = read_configuration(REPO / "pyproject.toml", expand=False)
    data = config["tool"]["setuptools"]["package-data"]
    patterns = data["nemo_minitron"]
    package = REPO / "nemo_minitron"
    covered = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files
    assert files <= covered
    for name in ("configs", "recipes"):
        shipped = {path for pattern in data[f"nemo_minitron._shipped.{name}"] for path in (REPO / name).glob(pattern)}
        assert {path for path in (REPO / name).rglob("*") if path.is_file()} <= shipped


def test_the_licence_is_apache_2() -> None:
    text = (REPO / "LICENSE").read_text()
    assert project()["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_toy_teacher_was_not_trained_on_what_the_toy_recipes_hold_out() -> None:
    from benchmarks import make_toy_teacher
    from nemo_minitron.stages.tokenize.params import TokenizeStage

    stage = TokenizeStage(**yaml.safe_load((REPO / "configs/data/toy_text.yaml").read_text()))
    assert stage.valid_fraction == make_toy_teacher.VALID_FRACTION
    assert stage.seed == make_toy_teacher.SPLIT_SEED
    assert [source.source for source in stage.sources] == ["asset:toy-text"]


# --- make -----------------------------------------------------------------------------------------


def dry_run(*args: str, path: Path | None = None) -> str:
    """Return the commands that make would run; programs of `path` come first on the PATH."""
    environment = _environment()
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(["make", "-n", *args], cwd=REPO, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment() -> dict[str, str]:
    """Return the environment without the options and variables of a make that runs these tests."""
    variables = ("VENV", "PYTHON", "PINS", "STACK", "WITH", "ARGS")
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MAKE", "MFLAGS", "COMPAT_")) and key not in variables
    }


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "check", "bench"])
def test_every_target_installs_first_and_only_once(tmp_path: Path, target: str) -> None:
    venv = tmp_path / "venv"
    fresh = dry_run(target, f"VENV={venv}")
    assert "-m venv" in fresh
    assert fresh.index("pip install") < fresh.index(f"{venv}/bin/", fresh.rindex("pip install"))
    venv.mkdir()
    (venv / ".installed").touch()
    assert "pip install" not in dry_run(target, f"VENV={venv}")


def test_only_torch_comes_from_the_requested_index(tmp_path: Path) -> None:
    lines = dry_run("install", f"VENV={tmp_path / 'venv'}", "TORCH_INDEX_URL=https://index/cpu").splitlines()
    assert ["torch-newest.txt" in line for line in lines if "--index-url https://index/cpu" in line] == [True]


def test_where_no_python_is_for_nemo_aligner_its_tests_are_left_out(tmp_path: Path) -> None:
    for name in ("python3.10", "python3.11", "python3.12"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".installed").touch()
    without = dry_run("test", "PYTHON=python3.12", f"VENV={tmp_path}", path=tmp_path)
    assert "env aligner" not in without
    assert "MINITRON_REQUIRE_ALIGNER" not in without
    (tmp_path / "python3.10").write_text("#!/bin/sh\nexit 0\n")
    found = dry_run("test", "PYTHON=python3.12", f"VENV={tmp_path}", path=tmp_path)
    assert "env aligner" in found
    assert "MINITRON_REQUIRE_ALIGNER=1" in found


@pytest.mark.parametrize(
    ("stack", "python", "lock"),
    [("oldest", "3.10", "oldest"), ("py311", "3.11", "newest"), ("current", "3.12", "newest")],
)
def test_each_stack_has_its_python_its_pins_and_an_environment_of_its_own(
    tmp_path: Path, stack: str, python: str, lock: str
) -> None:
    commands = dry_run("test-compat", f"STACK={stack}", f"COMPAT_VENV={tmp_path / 'venv'}", "WITH=numpy<2.4 a==1")
    assert f"python{python} -m venv {tmp_path / 'venv'}" in commands
    assert f"-r constraints/{lock}.lock -r constraints/dev.lock" in commands
    assert f"-r constraints/torch-{lock}.txt" in commands
    assert "'numpy<2.4' 'a==1'" in commands, "a shell takes < for a redirection"
    assert "COMPAT_VENV ?= .venv-$(STACK)" in (REPO / "Makefile").read_text()


NOT_ON_STACKS = {
    "tests/aligner": "NeMo-Aligner has an environment of its own, the same beside every stack",
    "tests/gpu": "needs a GPU",
    "tests/optional": "needs packages that no stack has",
    "tests/slurm": "starts and stops jobs; takes long",
    "tests/data": "no tests",
    "tests/support": "no tests",
}


def test_each_stack_runs_every_folder_of_tests_that_it_can(tmp_path: Path) -> None:
    words = dry_run("test-compat", f"COMPAT_VENV={tmp_path}").split()
    named = {word for before, word in pairwise(words) if before != "--ignore"}
    folders = {
        f"tests/{path.name}" for path in (REPO / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"
    }
    assert folders - named == NOT_ON_STACKS.keys()


def test_a_stack_that_there_is_not_is_refused_by_name() -> None:
    words = ["make", "-n", "test-compat", "STACK=new"]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, env=_environment())
    assert done.returncode != 0
    assert "STACK is oldest, py311 or current, not new" in done.stderr


def test_ci_runs_check_then_test() -> None:
    lines = [line for line in (REPO / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert lines == ["make check", "make test"]
    assert os.access(REPO / ".ci/run", os.X_OK)
