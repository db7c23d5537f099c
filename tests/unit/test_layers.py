"""Imports between the layers of the package, and modules that may name a kind of stage."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_minitron.launch.registry import BUILT_IN
from nemo_minitron.stages.registry import STAGES
from tests.support import layers


def test_a_layer_imports_lower_layers_only() -> None:
    order = list(layers.LAYERS)
    wrong = {
        f"{layers.module_name(file)} imports {module}"
        for file in layers.files()
        for module in layers.imports_of(file)
        for own, other in [(layers.layer_of(layers.module_name(file)), layers.layer_of(module))]
        if own is not None and other is not None and order.index(other) > order.index(own)
    }
    assert not wrong


def test_no_modules_import_each_other() -> None:
    """There must be no circle inside a layer either, nor through imports inside functions."""
    graph = {layers.module_name(file): set(layers.imports_of(file)) for file in layers.files()}
    assert not list(_circles(graph))


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    found, done = [], set[str]()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        for other in sorted(graph.get(module, set()) - {module}):
            visit(other, [*path, module])
        done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_the_architecture_page_has_the_table_of_the_layers() -> None:
    assert layers.document() == layers.DOCUMENT.read_text(), "run make reference"


ROOMS = sorted(path.parent.name for path in (layers.PACKAGE / "stages").glob("*/kind.py"))


def test_no_module_outside_a_kind_of_stage_imports_from_it() -> None:
    """The planner, the runner, the report and other kinds use its record instead."""
    for file in layers.files():
        for module in layers.imports_of(file):
            parts = module.split(".")
            if parts[:2] == ["nemo_minitron", "stages"] and len(parts) > 2 and parts[2] in ROOMS:
                assert file.parent.name == parts[2], f"{file} imports {module}"


def test_no_module_outside_a_kind_of_stage_compares_with_its_name() -> None:
    for file in layers.files():
        if file.parent.name in ROOMS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare) and _asks_kind(node.left):
                named = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not named & set(STAGES), f"{file}:{node.lineno}"


def _asks_kind(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "kind"


LAUNCHER_USERS = {"registry.py", "doctor.py"}
"""Modules outside the folders of launchers that may import from them: the list of all, and the parsers of Slurm."""


def test_no_module_outside_a_launcher_imports_from_it_or_compares_with_its_name() -> None:
    for file in layers.files():
        if file.parent.name in BUILT_IN or file.name in LAUNCHER_USERS:
            continue
        for module in layers.imports_of(file):
            parts = module.split(".")
            assert parts[1:2] != ["launch"] or not set(parts[2:3]) & set(BUILT_IN), f"{file} imports {module}"
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "launcher":
                named = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not named & set(BUILT_IN), f"{file}:{node.lineno}"


@pytest.mark.parametrize("name", STAGES)
def test_a_kind_of_stage_is_complete(name: str) -> None:
    """Its function exists, and its inputs have the roles of its keys."""
    from dataclasses import fields
    from typing import get_type_hints

    kind = STAGES[name]
    function = kind.load_function()
    roles = set(get_type_hints(kind.params)["inputs"].model_fields)
    assert {field.name for field in fields(get_type_hints(function)["inputs"])} == roles
    assert set(kind.inputs) <= roles


CORES = ("families", "pruning", "distillation", "workload")
_STAGE = re.compile(r"(?<!pipeline )\bstages?\b|\b(execution|launcher)\.")


def _texts(file: Path) -> Iterator[str]:
    """Yield all string constants of a file except docstrings."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_messages_of_the_layers_below_recipes_name_no_stage() -> None:
    """A stage adds its own name, its keys and its inputs (`errors.error_context`)."""
    found = [
        f"{file}: {text}"
        for core in CORES
        for file in (layers.PACKAGE / core).rglob("*.py")
        for text in _texts(file)
        if _STAGE.search(text)
    ]
    assert not found


@pytest.mark.parametrize(("text", "is_wrong"), [("Run the score stage.", True), ("2 pipeline stages", False)])
def test_stages_of_a_pipeline_are_no_stages_of_a_recipe(text: str, is_wrong: bool) -> None:
    assert bool(_STAGE.search(text)) == is_wrong
