"""Validation of a composed recipe, with one message for all problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from nemo_minitron.config.keys import kinds_of, members_of, stage_classes, without_labels
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ConfigError
from nemo_minitron.system.disclosure import is_private_key
from nemo_minitron.system.shown import shown

Location = tuple[Any, ...]
_MAX_SHOWN_CHARS, _QUOTE = 300, "'"
_EXPECTS = "Input should be "
"""Beginning of most messages of pydantic."""
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
        problems = problems_in(error, Recipe, raw)
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


def problems_in(error: ValidationError, root: type[BaseModel], raw: Mapping[str, Any]) -> list[str]:
    """Return one line for each wrong key or value, with what is allowed.

    Args:
        root: schema of `raw`, the values that were validated.
    """
    lines: list[str] = []
    # A value that fits no type of a union has one problem for each of them, shown on one line.
    members: dict[Location, list[str]] = {}
    line_of: dict[Location, int] = {}
    for problem in error.errors(include_url=False):
        path, found = without_labels(problem["loc"], root)
        if found or len(problem["loc"]) == len(path) or not problem["msg"].startswith(_EXPECTS):
            lines.append(_explain(problem, path, found, raw, without_labels(problem["loc"][:-1], root)[1]))
            continue
        members.setdefault(path, []).append(problem["msg"].removeprefix(_EXPECTS))
        if line_of.setdefault(path, len(lines)) == len(lines):
            lines.append("")
        lines[line_of[path]] = f"{_line_start(path, problem)}: input should be {', or '.join(members[path])}."
    return lines


def _line_start(path: Location, problem: Any) -> str:
    text = ".".join(map(str, path))
    return text if is_private_key(text) else f"{text} = {_quoted(problem['input'])}"


def _explain(problem: Any, path: Location, found: list[Any], raw: Mapping[str, Any], parent: list[Any]) -> str:
    text = ".".join(map(str, path))
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{text}: unknown key.{_nearest(str(path[-1]), parent)}"
    if kind == "missing":
        return f"{text}: required, but not given."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{text}{_wrong_kind(path, found, problem['input'], raw)}"
    if kind == "literal_error":
        return f"{text} = {_quoted(problem['input'])}: not allowed. Allowed: {context['expected']}."
    if is_private_key(text) and kind in ("string_type", "tuple_type"):
        return f"{text}: must be {'a text, in quotes' if kind == 'string_type' else 'a list'}."
    if kind == "string_type" and isinstance(problem["input"], bool | int | float):
        return f"{text} = {_quoted(problem['input'])}: must be a text; write it in quotes in the recipe."
    if kind == "tuple_type":
        value = _quoted(problem["input"])
        return f"{text} = {value}: must be a list, such as [{value.strip(_QUOTE)}]."
    return f"{_line_start(path, problem)}: {problem['msg'][0].lower() + problem['msg'][1:]}."


def _quoted(value: Any) -> str:
    """Return a wrong value as in the recipe, or a summary of it if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with more than 4,300 digits, or a value that is nested too deeply
        return shown(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else shown(value)


def _wrong_kind(path: Location, found: list[Any], value: Any, raw: Mapping[str, Any]) -> str:
    given = value.get("kind") if isinstance(value, Mapping) else None
    allowed = ", ".join(sorted(kind for section in members_of(found) for kind in kinds_of(section)))
    if path[0] != "stages" or len(path) > 2:
        return f".kind = {_quoted(given)}: not allowed. Allowed: {allowed}."
    others = [str(name) for name in raw["stages"] if str(name) != path[-1]]
    near = get_close_matches(str(path[-1]), others, n=1, cutoff=0.75)
    if given is None and near:
        return f": unknown stage without a kind. Did you mean stages.{near[0]}?"
    return f".kind = {_quoted(given)}: not a kind of stage. Allowed: {allowed}."


def _nearest(key: str, sections: list[Any]) -> str:
    keys = [key for section in members_of(sections) for key in section.model_fields]
    match = get_close_matches(key, keys, n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else f" Allowed: {', '.join(sorted(keys))}."
