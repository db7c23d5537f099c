"""The inputs of a stage as the dataclass that its function declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from nemo_minitron.artifacts.types import Artifact, ArtifactsByRole


@dataclass(frozen=True)
class NoInputs:
    """Inputs of a stage that reads no other stage."""


def typed_inputs(function: Callable[..., Any], found: ArtifactsByRole) -> Any:
    """The artifacts by role as the type of the function's parameter `inputs`.

    That type is a dataclass with a field for each role: `student: Model`, `cache: TeacherCache | None = None`, or
    `models: Mapping[str, Model]` for a role that several stages fill, by label or name.
    """
    declared = get_type_hints(function)["inputs"]
    hints = get_type_hints(declared)
    values: dict[str, Any] = {}
    for field in fields(declared):
        kind = _artifact_type(hints[field.name])
        if field.name in found.groups:
            values[field.name] = {label: _as(kind, one) for label, one in found.groups[field.name].items()}
        elif field.name in found.single:
            values[field.name] = _as(kind, found.single[field.name])
    return declared(**values)


def _artifact_type(hint: Any) -> type[Artifact]:
    """The artifact class inside Mapping[str, T] or T | None."""
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint
    inner = get_args(hint)
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        return _artifact_type(inner[1])
    return next(_artifact_type(one) for one in inner if one is not type(None))


def _as(kind: type[Artifact], artifact: Artifact) -> Artifact:
    return kind(**{field.name: getattr(artifact, field.name) for field in fields(Artifact)})
