"""The JSON schema and the page of keys match the schema, and the JSON schema accepts every shipped recipe."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from omegaconf import OmegaConf

from nemo_minitron.config.keys import stage_classes
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.config.reference import _default, _models, field_docs, json_schema, page
from nemo_minitron.stages.distill.params import DistillStage
from tests.conftest import REPO, Cli

FOLDER = REPO / "docs" / "reference"
RECIPES = sorted((REPO / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_both_files_are_up_to_date() -> None:
    if f"pydantic=={version('pydantic')}" not in (REPO / "constraints" / "newest.txt").read_text().splitlines():
        pytest.skip("other versions of pydantic spell the same schema differently")
    assert (FOLDER / "recipe.schema.json").read_text() == json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    assert (FOLDER / "keys.md").read_text() == page(), "make reference"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_json_schema_accepts_every_shipped_recipe(file: Path, validator: Any) -> None:
    found = [f"{'.'.join(map(str, one.absolute_path))}: {one.message}" for one in validator.iter_errors(load(file))]
    assert not found


def load(file: Path) -> Any:
    """Read a recipe with numbers as in OmegaConf and editors; PyYAML would read 1e9 as text."""
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


@pytest.mark.parametrize(
    "stages",
    [
        {"distill": {"num_stepz": 3}},
        {"distill": {"num_steps": -3}},
        {"distill": {"lr": "fast"}},
        {"mine": {"kind": "destill"}},
        {"score": {"method": "taylr"}},
    ],
)
def test_the_json_schema_rejects_misspelled_keys_and_values_out_of_bounds(
    stages: dict[str, Any], validator: Any
) -> None:
    assert not validator.is_valid({"stages": stages})


def test_any_value_can_be_an_interpolation(validator: Any) -> None:
    assert validator.is_valid({"stages": {"distill": {"num_steps": "${stages.other.num_steps}", "lr": 1e-4}}})


def test_a_key_is_described_by_the_docstring_below_it_also_if_inherited() -> None:
    assert field_docs(DistillStage)["global_batch_size"] == "Sequences per optimizer step."
    properties = json_schema()["$defs"]["DistillStage"]["properties"]
    assert properties["global_batch_size"]["description"] == "Sequences per optimizer step."


def test_the_page_has_every_stage_and_every_key() -> None:
    text = page()
    for kind, model in stage_classes().items():
        _, _, rest = text.partition(f"## Stage `{kind}`\n")
        section = rest.partition("\n## ")[0]
        assert all(f"| `{key}` |" in section for key in model.model_fields if key != "kind"), kind


def test_a_default_of_null_is_a_value_that_the_key_accepts() -> None:
    schema = Recipe.model_json_schema()
    found = [
        (model.__name__, key, value)
        for model in _models(Recipe)
        for key, value in schema["$defs"].get(model.__name__, schema)["properties"].items()
        if _default(value, model.model_fields[key]) == "`null`"
    ]
    assert len(found) > 50
    assert not [(name, key) for name, key, value in found if {"type": "null"} not in value.get("anyOf", ())]
    assert "| `parallel_by_stage` | map | `{}` |" in page()


def test_the_command_prints_both(minitron: Cli) -> None:
    code, output = minitron("schema")
    assert code == 0
    assert json.loads(output)["title"] == "Recipe of nemo-minitron"
    code, output = minitron("schema", "--page")
    assert code == 0
    assert output.startswith("# Recipe keys")
