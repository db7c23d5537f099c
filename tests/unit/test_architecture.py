"""The rules of docs/ARCHITECTURE.md, enforced."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO, TOY

PACKAGE = REPO / "nemo_minitron"
FILES = sorted(PACKAGE.rglob("*.py"))
ENTRY = PACKAGE / "backends/alignment/nemo_aligner/entry"
"""Scripts that run in NeMo-Aligner's environment, which has other versions of everything."""
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_RECIPE_LINES = 400, 60, 60
P99_FUNCTION_LINES = 38
"""Bound on the 99th percentile."""
DOORS: dict[str, str | tuple[str, ...]] = {
    "megatron": "backends/megatron/",
    "transformer_engine": "backends/megatron/",
    "torch.distributed": "backends/megatron/",
    "hydra": ("config/compose.py", "config/overrides.py"),
    "omegaconf": ("config/", "system/bounded.py"),
    "lm_eval": "evaluation/",
    "wandb": "backends/megatron/training/curves.py",
}


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", DOORS)
def test_a_framework_is_imported_by_its_adapters_only(package: str) -> None:
    allowed = DOORS[package]
    users = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        if ENTRY not in file.parents
        for name in _imports(file)
        if name == package or name.startswith(f"{package}.")
    }
    assert users or package == "transformer_engine"
    assert all(user.startswith(allowed) for user in users), users


def test_the_two_environments_never_import_each_other() -> None:
    for file in FILES:
        tops = {name.split(".")[0] for name in _imports(file)}
        if ENTRY in file.parents:
            assert "nemo_minitron" not in tops, file
        else:
            assert not tops & {"nemo", "nemo_aligner", "lightning"}, file


PARTS = {
    "decoder",
    "self_attention",
    "input_layernorm",
    "pre_mlp_layernorm",
    "final_layernorm",
    "output_layer",
    "word_embeddings",
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "layer_number",
}
"""Megatron's names for the parts of a model."""
KNOW_PARTS = ("parts.py", "layers.py")
"""Modules that may use these names; the second has the specs that models are built from."""


def _names(file: Path) -> Iterator[str]:
    """Yield all attributes, names and keywords in a file, and the parts of its strings without spaces."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield from node.value.split(".")


def test_one_module_knows_where_a_megatron_model_has_its_parts() -> None:
    """Changes of Megatron's classes and names then affect one module."""
    found = {file.name: set(_names(file)) for file in (PACKAGE / "backends/megatron").rglob("*.py")}
    others = {name: names & PARTS for name, names in found.items() if names & PARTS and name not in KNOW_PARTS}
    assert not others
    assert set.union(*(found[name] for name in KNOW_PARTS)) >= PARTS
    assert {name for name, names in found.items() if "GPTModel" in names} == {"build.py", "versions.py"}


def test_files_and_functions_stay_small() -> None:
    long = []
    for file in FILES:
        text = file.read_text()
        if len(text.splitlines()) > MAX_FILE_LINES:
            long.append(f"{file.relative_to(REPO)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES:
                long.append(f"{file.relative_to(REPO)}:{node.lineno} {node.name}")
    assert not long


def test_nearly_all_functions_are_short() -> None:
    sizes = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert sizes[int(0.99 * len(sizes))] <= P99_FUNCTION_LINES


def test_recipes_stay_small() -> None:
    for recipe in (REPO / "recipes").rglob("*.yaml"):
        lines = recipe.read_text().splitlines()
        # The template is mostly comments.
        content = [line for line in lines if line.strip() and not line.strip().startswith("#")]
        assert len(content) <= MAX_RECIPE_LINES, recipe


def test_no_pickle_and_no_shell() -> None:
    for file in FILES:
        text = file.read_text()
        for banned in ("shell=True", "weights_only=False", "yaml.load(", "import pickle", "os.system(", "WEIGHTS_ONLY"):
            # This module reads pickles of checkpoints, with a list of the allowed classes.
            reads = file.name == "known_pickles.py" and banned == "import pickle"
            assert reads or banned not in text, f"{file}: {banned}"


def test_files_of_a_run_are_opened_without_following_links() -> None:
    """These modules write files that several users may reach; outputs and work of stages are inside checked folders."""
    for name in (
        "artifacts/store.py",
        "artifacts/compared.py",
        "execution/runner.py",
        "execution/ranks.py",
        "execution/job.py",
    ):
        text = (PACKAGE / name).read_text()
        for banned in (".write_text(", '.open("', "copyfile(", "FileHandler("):
            assert banned not in text, f"{name}: {banned}"


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


HEAVY = ("torch", "transformers", "megatron", "numpy", "matplotlib", "asyncio", "multiprocessing", "rich.progress")
COMMANDS = ("assets", "run", "show", "status")
"""Some commands whose modules import what `check` and `plan` do not need."""
PACKAGES = ("bundle", "evaluation", "execution", "launch", "report")
UNUSED_BY = {
    command: [
        *HEAVY,
        *more,
        *(f"nemo_minitron.cli.{other}" for other in COMMANDS),
        *(f"nemo_minitron.{package}" for package in PACKAGES),
    ]
    for command, more in (("check", ("rich.table", "nemo_minitron.cli.plan")), ("plan", ("nemo_minitron.cli.check",)))
}
"""Prefixes of modules that a command may not import, because they would make its start slow."""


@pytest.mark.parametrize("command", ["check", "plan"])
def test_check_and_plan_load_no_heavy_package_and_start_within_a_second(command: str) -> None:
    code = (
        "import sys; sys.argv = ['minitron', *sys.argv[1:]]\n"
        "from nemo_minitron.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        f"loaded = [module for module in sys.modules if module.startswith({tuple(UNUSED_BY[command])})]\n"
        "assert not loaded, loaded\n"
    )
    # CPU time depends little on how busy the machine is. Importing the libraries takes about a quarter of a second; on
    # slower machines both take longer.
    libraries = "import hydra, pydantic, rich.console, typer, yaml"
    times_s = [(_cpu_s("-c", libraries), _cpu_s("-c", code, command, str(TOY))) for _ in range(3)]
    libraries_s, command_s = (min(times) for times in zip(*times_s, strict=True))
    assert command_s < max(1.0, 4 * libraries_s), times_s


def _cpu_s(*arguments: str) -> float:
    """Run Python with these arguments, and return the CPU seconds that it takes."""
    before_s = _children_cpu_s()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
    return _children_cpu_s() - before_s
