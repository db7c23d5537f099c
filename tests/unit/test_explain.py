"""Messages about wrong keys and values, and values that YAML or a shell changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.config.keys import members_of, without_labels
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ConfigError
from tests.conftest import TOY

DISTILL = "stages.distill.loss"


def _own(folder: Path, text: str) -> Path:
    file = folder / "own.yaml"
    file.write_text(f"defaults: [toy/width, _self_]\n{text}\n")
    return file


def _problems(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return [line for line in caught.value.what.splitlines() if line.startswith("  - ")]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (f"{DISTILL}.logits.sparse={{kind: top_k}}", f"{DISTILL}.logits.sparse.k: required, but not given."),
        (
            f"{DISTILL}.logits.sparse={{kind: sampled, round: 50}}",
            f"{DISTILL}.logits.sparse.round: unknown key. Did you mean rounds?",
        ),
        (
            f"{DISTILL}.logits.sparse={{kind: sampled, zzz: 50}}",
            f"{DISTILL}.logits.sparse.zzz: unknown key. Allowed: kind, rounds.",
        ),
        (
            f"{DISTILL}.logits.sparse={{kind: topk}}",
            f"{DISTILL}.logits.sparse.kind = 'topk': not allowed. Allowed: sampled, top_k.",
        ),
        (
            f"{DISTILL}.next_token=balance",
            f"{DISTILL}.next_token = 'balance': input should be a valid number, unable to parse string as a number, "
            "or 'balanced'.",
        ),
        (
            f"{DISTILL}.hidden={{weight: -1}}",
            f"{DISTILL}.hidden.weight = -1: input should be greater than 0, or 'dynamic'.",
        ),
        (f"{DISTILL}.hidden.states=[x]", f"{DISTILL}.hidden.states.0 = 'x': not allowed."),
        ("stages.distill.kind=distil", "stages.distill.kind = 'distil': not a kind of stage. Allowed: adopt, "),
        ("stages.distil={num_steps: 1}", "stages.distil: unknown stage without a kind. Did you mean stages.distill?"),
        ("execution.parallel_by_stage={Distill: {tp: 2}}", "execution.parallel_by_stage.Distill = 'Distill': "),
    ],
)
def test_a_message_names_the_key_of_the_recipe_and_what_is_allowed_there(override: str, line: str) -> None:
    problem = _problems(TOY, override)[0]  # other stages may refer to the value
    assert problem.startswith(f"  - {line}")


def test_a_stage_name_that_yaml_reads_as_a_number_is_a_message(tmp_path: Path) -> None:
    recipe = _own(tmp_path, "stages:\n  1.5: {kind: prune, foo: 1}")
    name, key = _problems(recipe)
    assert name == "  - stages.1.5 = 1.5: must be a text; write it in quotes in the recipe."
    assert key.startswith("  - stages.1.5.foo: unknown key. Allowed: inputs, kind")


@pytest.mark.parametrize(
    ("location", "path", "names"),
    [
        (("execution", "threads"), "execution.threads", ["int"]),
        (("execution", "cluster", "environment", "1A", "[key]"), "execution.cluster.environment.1A", ["str"]),
        (("stages", "a", "tokenize", "sources", 0), "stages.a.sources.0", ["DataSource"]),
    ],
)
def test_labels_are_not_part_of_a_path(location: tuple[Any, ...], path: str, names: list[str]) -> None:
    found, annotations = without_labels(location, Recipe)
    assert ".".join(map(str, found)) == path
    assert [member.__name__ for member in members_of(annotations)] == names


def test_off_needs_no_quotes(tmp_path: Path) -> None:
    recipe = load_recipe(
        _own(tmp_path, "stages: {select: {head_merge: off}}\nexecution: {kernels: {fused_kl: off}}"), []
    )
    assert recipe.stages["select"].head_merge == "off"  # type: ignore[union-attr]
    assert recipe.execution.kernels.fused_kl == "off"
    (problem,) = _problems(_own(tmp_path, "execution: {kernels: {fused_kl: on}}"))
    assert "fused_kl = True: not allowed. Allowed: 'auto', 'triton', 'torch' or 'off'." in problem


@pytest.mark.parametrize("key", ["run_root", "assets_dir", "cluster.setup_script", "cluster.container.core_image"])
def test_a_variable_of_a_shell_is_refused_in_a_path(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = _problems(TOY, f"execution.{key}=$SCRATCH/x")
    assert "no shell replaces $SCRATCH in a recipe; write ${oc.env:SCRATCH}" in problem
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    recipe = load_recipe(TOY, ["execution.run_root=${oc.env:SCRATCH}/x", "execution.assets_dir=a$(b)$1"])
    assert (recipe.execution.run_root, recipe.execution.assets_dir) == (f"{tmp_path}/x", "a$(b)$1")


def test_escapes_of_a_separator_are_decoded_in_double_quotes_and_else_refused() -> None:
    key = "stages.data.sources.0.document_separator"
    for written, read in (
        ('"\\f"', "\f"),
        ('"\\n--\\n"', "\n--\n"),
        ('"\\d"', "\\d"),
        ("'\\d'", "\\d"),
        ("\\newpage", "\\newpage"),
    ):
        recipe = load_recipe(TOY, [f"{key}={written}"])
        assert recipe.stages["data"].sources[0].document_separator == read  # type: ignore[union-attr]
        recipe = load_recipe(TOY, [f"stages.data.sources=[{{source: a.txt, document_separator: {written}}}]"])
        assert recipe.stages["data"].sources[0].document_separator == read  # type: ignore[union-attr]
    for written in ("\\f", "'\\n\\n'"):
        problem = _problems(TOY, f"{key}={written}")[0]
        assert "is a backslash and a letter" in problem
