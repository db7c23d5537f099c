"""The layers of the package: which parts import which. `make reference` writes the table into docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPO

PACKAGE = REPO / "nemo_minitron"
DOCUMENT = REPO / "docs" / "ARCHITECTURE.md"
BEGIN, END = "<!-- layers: begin -->", "<!-- layers: end -->"
LAYERS = {
    "errors, limits": "Errors that a user can cause; how much of an input is read.",
    "system": "Files, disks, owners, signals, progress, secrets, the terminal.",
    "schema": "Keys that sections of a recipe share, with their defaults.",
    "families": "Shapes, the axis table, config.json of each family; no torch.",
    "artifacts": "Manifests, publishing, locks, the names of a run's files.",
    "processes": "Starting the processes of a stage on one or several nodes.",
    "hf": "Hugging Face checkpoints tensor by tensor, GGUF, tokenizers, where models come from.",
    "data": "Documents and chat rows: reading, splitting, tokenizing, rendering.",
    "assets": "Models and texts that `minitron assets fetch` downloads.",
    "distillation": "Losses with their gradients, the teacher's cache; pure functions of tensors.",
    "pruning": "Importance, selection and slicing; pure functions of tensors.",
    "workload": "Memory, tokens and operations of a stage.",
    "backends.megatron": "The only code that imports megatron or torch.distributed.",
    "backends.alignment": "NeMo-Aligner, in an environment of its own.",
    "stages (records)": "The record of each kind of stage, its keys, and the registry; no torch.",
    "config": "Recipes: composition by Hydra, validation, the reference of all keys.",
    "plan": "Order, fingerprints, rules across stages, costs; no torch.",
    "evaluation": "The one loader for transformers, lm-eval, generation, speed.",
    "execution": "The runner, its ranks, and the folders that they work in.",
    "launch": "Jobs for Slurm, containers and this machine.",
    "report": "JSON, Markdown and HTML from finished stages.",
    "stages (functions)": "The function of each kind of stage, and what several of them share.",
    "doctor": "What this machine has of all that the stages can use.",
    "bundle": "What recipes need, packed for a machine without a network.",
    "api": "Load, plan, run and report from Python.",
    "cli": "The commands.",
}
"""Layer -> what it holds, from the lowest to the highest. A layer imports only lower ones."""
RECORDS = (
    "kind",
    "params",
    "expansion",
    "registry",
    "artifacts",
    "typed_inputs",
    "context",
    "hidden_rules",
    "plan_rules",
    "scoring_rules",
    "repair_rules",
)
"""Modules in `stages` that describe stages and run none."""


def layer_of(module: str) -> str | None:
    """Return the layer of a module such as `nemo_minitron.plan.view`; None for modules outside the layers."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in ("__main__", "start", "toy", "chats"):
        return None
    if parts[0] == "stages":
        return "stages (records)" if len(parts) == 1 or parts[-1] in RECORDS else "stages (functions)"
    name = ".".join(parts[:2]) if parts[0] == "backends" else parts[0]
    if name == "backends":
        return None
    return next(layer for layer in LAYERS if name in layer.split(", "))


def imports_of(file: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, also inside functions, but not only for type checking."""
    tree = ast.parse(file.read_text())
    for node in _without_typing(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("nemo_minitron"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_minitron"):
            for alias in node.names:
                yield _module(f"{node.module}.{alias.name}") or str(node.module)


def _without_typing(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _without_typing(node)


def _module(name: str) -> str | None:
    path = REPO.joinpath(*name.split("."))
    return name if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() else None


def module_name(file: Path) -> str:
    """Return the dotted name of a file of the package."""
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def files() -> list[Path]:
    """Return the files of the package, without the scripts that run in NeMo-Aligner's environment."""
    return [file for file in sorted(PACKAGE.rglob("*.py")) if "entry" not in file.parts and "start" not in file.parts]


def matrix() -> dict[str, set[str]]:
    """Return layer -> the other layers that its modules import."""
    found: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for file in files():
        own = layer_of(module_name(file))
        if own is not None:
            others = {layer_of(module) for module in imports_of(file)} - {own, None}
            found[own] |= {str(other) for other in others}
    return {layer: others for layer, others in found.items() if others or _exists(layer)}


def _exists(layer: str) -> bool:
    return any(layer_of(module_name(file)) == layer for file in files())


def table() -> str:
    """Return the layers as a Markdown table."""
    order = list(LAYERS)
    rows = ["| layer | what it holds | imports |", "|---|---|---|"]
    for layer, others in matrix().items():
        listed = ", ".join(sorted(others, key=order.index)) or "nothing of the package"
        rows.append(f"| `{layer}` | {LAYERS[layer]} | {listed} |")
    return "\n".join(rows)


def document() -> str:
    """Return docs/ARCHITECTURE.md with the current table."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
