"""Look-up of keys in the schema: whether the value of a key is text, a list, or something else."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.stages.registry import STAGES

Kind = Literal["text", "list", "other", "unknown"]
_WRONG_KEY = "[key]"
"""Last step of the location of an error about a key of a mapping."""


def stage_classes() -> dict[str, type[BaseModel]]:
    """Return kind of stage -> class of its keys."""
    return {name: kind.params for name, kind in STAGES.items()}


def value_kind(key: str, root: type[BaseModel] = Recipe) -> Kind:
    """Return the type of value that a dotted key such as `stages.teacher.source` holds.

    If the name of a stage is not a kind, the stage may be of any kind that has the key. The result is `unknown` for
    keys that the schema does not have and for keys that may hold any value.
    """
    found = [leaf for annotation in _at(key.split("."), root) for leaf in _parts(annotation)]
    kinds = {_kind_of(leaf) for leaf in found if leaf is not type(None)}
    return kinds.pop() if len(kinds) == 1 else "other" if kinds else "unknown"


def _kind_of(leaf: Any) -> Kind:
    if leaf is str or (get_origin(leaf) is Literal and all(isinstance(value, str) for value in get_args(leaf))):
        return "text"
    if get_origin(leaf) in (tuple, list):
        return "list"
    return "unknown" if leaf is Any else "other"


def _at(steps: Sequence[str], root: type[BaseModel]) -> list[Any]:
    """Return the possible annotations in the schema at a path."""
    found: list[Any] = [root]
    for number, step in enumerate(steps):
        if number == 1 and steps[0] == "stages" and root is Recipe:
            known = stage_classes()
            found = [known[step]] if step in known else list(known.values())
        else:
            found = [inner for annotation in found for inner in _below(annotation, step)]
    return found


def _below(annotation: Any, step: str) -> Iterator[Any]:
    for part in _parts(annotation):
        if is_section(part):
            if step in part.model_fields:
                yield part.model_fields[step].annotation
        elif get_origin(part) is dict:
            yield get_args(part)[1]
        elif get_origin(part) is tuple and step.isdigit():
            yield get_args(part)[0]
        elif part is Any:
            yield Any


def without_labels(location: Sequence[Any], root: type[BaseModel]) -> tuple[tuple[Any, ...], list[Any]]:
    """Return the keys in the location of a pydantic error, and what the schema may hold there (types or classes).

    A location also contains labels: of the member of a union to which the rest belongs, and of a key that is wrong
    itself.
    """
    path: list[Any] = []
    found: list[Any] = [root]
    for step in location:
        if step == _WRONG_KEY:
            continue
        members = members_of(found)
        if len(members) > 1:
            sections = filter(is_section, members)
            found = [section for section in sections if step in (section.__name__, *kinds_of(section))]
        else:
            path.append(step)
            found = [inner for member in members for inner in _below(member, str(step))]
    return tuple(path), found


def members_of(annotations: Sequence[Any]) -> list[Any]:
    """Return the members of unions in annotations, without None."""
    return [part for annotation in annotations for part in _parts(annotation) if part is not type(None)]


def kinds_of(section: type[BaseModel]) -> tuple[str, ...]:
    """Return the values of `kind` of a class of the schema, by which unions are told apart."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether an annotation is a class of the schema. On Python 3.10, `list[str]` is an instance of type too."""
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the schema classes in an annotation, also inside tuple, dict, unions and Annotated."""
    if is_section(annotation):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, dict):
        for argument in get_args(annotation):
            yield from sections_in(argument)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield the members of unions and the types inside Annotated."""
    if get_origin(annotation) is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation
