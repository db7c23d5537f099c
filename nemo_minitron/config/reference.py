"""The JSON schema for editors and the page of all recipe keys, generated from the schema and its docstrings."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nemo_minitron.config.keys import sections_in, stage_classes
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.schema.execution import Execution

DIALECT = "https://json-schema.org/draft/2020-12/schema"
INTERPOLATION = {"type": "string", "pattern": r"\$\{.*\}"}
"""JSON schema of an OmegaConf interpolation, which can replace a value of any type."""
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
_PAGE = """# Recipe keys

Every key of a recipe, with its type, its default and its meaning. `minitron schema --page` writes this page, and
`minitron schema` the JSON schema with which an editor completes and checks a recipe: see
[recipes/README.md](../../recipes/README.md#in-an-editor).
A key without a default must be given. `A | null` means that the key may be null, which usually switches a feature off.
"""


@cache
def field_docs(model: type[BaseModel]) -> Mapping[str, str]:
    """Return field name -> the docstring below it, for the fields of a model and of its base classes."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            text = _string(following)
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and text:
                found[statement.target.id] = inspect.cleandoc(text)
    return found


def _string(statement: ast.stmt) -> str | None:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipe files.

    No key is required, because a recipe can inherit keys from its `defaults`, and any value can be an interpolation.
    """
    schema = _plain(Recipe.model_json_schema())
    definitions = schema["$defs"]
    for model in _models(Recipe):
        _describe(schema if model is Recipe else definitions[model.__name__], model)
    for part in (schema, *definitions.values()):
        part.pop("required", None)
        for key, value in part.get("properties", {}).items():
            part["properties"][key] = _or_interpolation(value)
    stages = {kind: {"$ref": f"#/$defs/{model.__name__}"} for kind, model in stage_classes().items()}
    # A stage that has the name of a kind is of that kind, unless it names another.
    definitions["AnyStage"] = {"anyOf": list(stages.values())}
    any_kind, names_kind = {"$ref": "#/$defs/AnyStage"}, {"required": ["kind"]}
    schema["properties"] |= {
        "defaults": {"type": "array", "description": "Configs and recipes that this one starts from, as in Hydra."},
        "stages": {
            "type": "object",
            "description": "Stage name -> its keys. A stage whose name is not that of its kind needs the key `kind`.",
            "properties": {kind: {"if": names_kind, "then": any_kind, "else": own} for kind, own in stages.items()},
            "additionalProperties": any_kind,
        },
    }
    return {"$schema": DIALECT, **schema, "title": "Recipe of nemo-minitron"}


def _plain(part: Any) -> Any:
    """Remove entries that only some versions of pydantic write: `enum` beside `const`, and default permissions."""
    if isinstance(part, list):
        return [_plain(one) for one in part]
    if not isinstance(part, dict):
        return part
    spare = (
        {"enum"} if "const" in part else {"additionalProperties"} if part.get("additionalProperties") is True else set()
    )
    return {key: _plain(value) for key, value in part.items() if key not in spare}


def _describe(part: dict[str, Any], model: type[BaseModel]) -> None:
    for key, text in field_docs(model).items():
        if key in part.get("properties", {}):
            part["properties"][key]["description"] = text


def _or_interpolation(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type") == "string" and "enum" not in value and "const" not in value:
        return value
    about: dict[str, Any] = {key: value.pop(key) for key in ("description", "title", "default") if key in value}
    choices = value.pop("anyOf") if value.keys() == {"anyOf"} else [value]
    return {**about, "anyOf": [*choices, INTERPOLATION]}


def _models(root: type[BaseModel]) -> list[type[BaseModel]]:
    """List a model and all models in its fields, each once, in the order of their first use."""
    found = [root]
    for model in found:
        for field in model.model_fields.values():
            found += [one for one in sections_in(field.annotation) if one not in found]
    return found


def page() -> str:
    """Return the Markdown page of all keys: the stages by kind, then `execution`, then the sections inside them."""
    definitions = Recipe.model_json_schema()["$defs"]
    stages = list(stage_classes().items())
    tops = [*(model for _, model in stages), Execution]
    rest = [model for model in _models(Recipe) if model not in (*tops, Recipe)]
    sections = [f"## Stage `{kind}`\n\n{_section(model, definitions)}" for kind, model in stages]
    sections.append(f"## `execution`\n\n{_section(Execution, definitions)}")
    sections += [f"### {model.__name__}\n\n{_section(model, definitions)}" for model in rest]
    return "\n".join([_PAGE, *sections])


def _section(model: type[BaseModel], definitions: Mapping[str, Any]) -> str:
    about = inspect.cleandoc(model.__dict__.get("__doc__") or "")
    part = definitions[model.__name__]
    rows = [
        f"| `{key}` | {_type(value)} | {_default(value, model.model_fields[key])} | {_cell(doc)} |"
        for key, value in part.get("properties", {}).items()
        for doc in [field_docs(model).get(key, "")]
        if key != "kind" or len(value.get("enum", ())) > 1
    ]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    return "\n".join([*([about, ""] if about else []), *table])


def _type(value: Mapping[str, Any]) -> str:
    """Return the type of a value as text, with its bounds; sections are links."""
    if "$ref" in value:
        name = str(value["$ref"]).rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    choices = value.get("anyOf", value.get("oneOf"))
    if choices:
        return " \\| ".join(_type(one) for one in choices)
    if "const" in value or "enum" in value:
        return " \\| ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    kind = str(value.get("type", "any"))
    if kind == "array":
        inner = value.get("items") or {"anyOf": value.get("prefixItems", [{}])}
        return f"list of {_type(inner)}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"map to {_type(inner)}" if isinstance(inner, dict) else "map"
    bounds = [text.format(value[key]) for key, text in _BOUNDS.items() if key in value]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _default(value: Mapping[str, Any], field: FieldInfo) -> str:
    """Return the default as in YAML; the defaults of a section are listed in its own table."""
    if field.is_required():
        return "required"
    if isinstance(value.get("default"), dict):
        return "its defaults"
    # The JSON schema has no default for a map, which a factory makes.
    default = value["default"] if "default" in value else field.get_default(call_default_factory=True)
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
