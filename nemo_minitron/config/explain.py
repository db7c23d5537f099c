"""Validation of a composed recipe, with one message for all problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from nemo_minitron.config.keys import sections_in, stage_classes
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ConfigError
from nemo_minitron.system.disclosure import is_private_key
from nemo_minitron.system.shown import shown

Location = tuple[Any, ...]
_MAX_SHOWN_CHARS, _QUOTE = 300, "'"
_MAX_BITS = 1000


def validate(composed: Mapping[str, Any], *, where: str) -> Recipe:
    """Validate a composed recipe and return it as a frozen object.

    Raises:
        ConfigError: the recipe is invalid; the message lists every wrong key and value, with what is allowed.
    """
    raw = _with_kinds(composed)
    _refuse_long_numbers(raw, where)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(problem, raw) for problem in error.errors(include_url=False)]
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise ConfigError(
            f"The recipe has {count}:\n" + "\n".join(f"  - {problem}" for problem in problems),
            where=where,
            next_step="docs/reference/keys.md lists all keys with their defaults; `minitron schema --page` prints it.",
        ) from None


def _refuse_long_numbers(raw: Mapping[str, Any], where: str) -> None:
    """Reject very long integers: YAML reads hexadecimal numbers of any length, and Python cannot print them all."""
    waiting: list[tuple[str, Any]] = [("", raw)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise ConfigError(f"{key}: a number with more than 300 digits.", where=where)
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        waiting.extend((f"{key}.{name}".lstrip("."), inner) for name, inner in items)


def _with_kinds(composed: Mapping[str, Any]) -> dict[str, Any]:
    """Add the key `kind` to stages without it whose name is that of a kind."""
    raw = dict(composed)
    stages = raw.get("stages")
    if isinstance(stages, Mapping):
        known = stage_classes()
        raw["stages"] = {
            name: {"kind": name, **stage} if isinstance(stage, Mapping) and name in known else stage
            for name, stage in stages.items()
        }
    return raw


def _explain(problem: Any, raw: Mapping[str, Any]) -> str:
    path = _path(problem["loc"], raw)
    text = ".".join(map(str, path))
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{text}: unknown key.{_nearest(str(path[-1]), path[:-1], raw)}"
    if kind == "missing":
        return f"{text}: required, but not given."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{text}{_wrong_kind(str(path[-1]), raw)}"
    if kind == "literal_error":
        return f"{text} = {_quoted(problem['input'])}: not allowed. Allowed: {context['expected']}."
    if is_private_key(text) and kind in ("string_type", "tuple_type"):
        return f"{text}: must be {'a text, in quotes' if kind == 'string_type' else 'a list'}."
    if kind == "string_type" and isinstance(problem["input"], bool | int | float):
        return f"{text} = {_quoted(problem['input'])}: must be a text; write it in quotes in the recipe."
    if kind == "tuple_type":
        value = _quoted(problem["input"])
        return f"{text} = {value}: must be a list, such as [{value.strip(_QUOTE)}]."
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if is_private_key(text):
        return f"{text}: {message}."
    return f"{text} = {_quoted(problem['input'])}: {message}."


def _quoted(value: Any) -> str:
    """Return a wrong value as in the recipe, or a summary of it if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with more than 4,300 digits, or a value that is nested too deeply
        return shown(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else shown(value)


def _wrong_kind(name: str, raw: Mapping[str, Any]) -> str:
    stages = {str(other): stage for other, stage in raw["stages"].items()}
    stage = stages.get(name)
    found = stage.get("kind") if isinstance(stage, Mapping) else None
    near = get_close_matches(name, [other for other in stages if other != name], n=1, cutoff=0.75)
    if found is None and near:
        return f": unknown stage without a kind. Did you mean stages.{near[0]}?"
    return f".kind = {_quoted(found)}: not a kind of stage. Allowed: {', '.join(sorted(stage_classes()))}."


def _path(location: Location, raw: Mapping[str, Any]) -> Location:
    """Return the location without the tag that pydantic adds after the name of a stage."""
    if len(location) > 2 and location[0] == "stages" and location[2] in stage_classes():
        return (*location[:2], *location[3:])
    return location


def _nearest(key: str, parent: Location, raw: Mapping[str, Any]) -> str:
    keys = _keys_at(parent, raw)
    match = get_close_matches(key, keys, n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else f" Allowed: {', '.join(sorted(keys))}."


def _keys_at(parent: Location, raw: Mapping[str, Any]) -> list[str]:
    """Return the field names of the schema at a path."""
    model: type[BaseModel] = Recipe
    steps = list(parent)
    if steps[:1] == ["stages"] and len(steps) > 1:
        kind = raw["stages"][steps[1]].get("kind")
        model, steps = stage_classes()[kind], steps[2:]
    for step in steps:
        if isinstance(step, int) or step not in model.model_fields:
            continue
        nested = list(sections_in(model.model_fields[step].annotation))
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
