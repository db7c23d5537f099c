"""What `make` installs fits what the package asks for; what the package needs at run time is in it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools.config.pyprojecttoml import read_configuration

REPO = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12")


def project() -> dict[str, Any]:
    return read_configuration(REPO / "pyproject.toml", expand=False)["project"]


def pins(python: str) -> dict[str, Version]:
    """Package -> version that the constraints pin for a Python."""
    found: dict[str, Version] = {}
    for line in (REPO / "constraints" / "newest.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = Version(str(requirement.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_its_range(python: str) -> None:
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["eval"]]
    wanted += project()["optional-dependencies"]["dev"]
    pinned = pins(python)
    for requirement in map(Requirement, wanted):
        if requirement.name != "torch":
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_torch_is_pinned_in_the_makefile_alone() -> None:
    version = re.search(r"^TORCH_VERSION \?= (\S+)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    asked = next(Requirement(text) for text in project()["dependencies"] if text.startswith("torch"))
    assert version is not None
    assert Version(version[1]) in asked.specifier
    assert not [name for name in pins("3.11") if name.startswith(("torch", "nvidia", "triton", "cuda"))]


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
    assert {canonicalize_name(packages.get(name, name)) for name in foreign} <= declared


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
    from nemo_minitron.config.schema import TokenizeStage

    stage = TokenizeStage(**yaml.safe_load((REPO / "configs/data/toy_text.yaml").read_text()))
    assert stage.valid_fraction == make_toy_teacher.VALID_FRACTION
    assert stage.seed == make_toy_teacher.SPLIT_SEED
    assert [source.source for source in stage.sources] == ["asset:toy-text"]


# --- make -----------------------------------------------------------------------------------------


def dry_run(*args: str) -> str:
    """The commands that make would run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(["make", "-n", *args], cwd=REPO, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "check", "bench"])
def test_every_target_installs_first_and_only_once(tmp_path: Path, target: str) -> None:
    venv = tmp_path / "venv"
    fresh = dry_run(target, f"VENV={venv}")
    assert "-m venv" in fresh
    assert fresh.index("pip install") < fresh.index(f"{venv}/bin/", fresh.rindex("pip install"))
    venv.mkdir()
    (venv / ".installed").touch()
    assert "pip install" not in dry_run(target, f"VENV={venv}")


def test_torch_comes_from_the_index_asked_for_and_nothing_else_does(tmp_path: Path) -> None:
    lines = dry_run("install", f"VENV={tmp_path / 'venv'}", "TORCH_INDEX_URL=https://index/cpu").splitlines()
    assert ["torch==" in line for line in lines if "--index-url https://index/cpu" in line] == [True]


def test_ci_runs_check_then_test() -> None:
    lines = [line for line in (REPO / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert lines == ["make check", "make test"]
    assert os.access(REPO / ".ci/run", os.X_OK)
