"""Conversion of a stage's inputs into the dataclass that its function declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from nemo_minitron.artifacts.types import Artifact, ArtifactsByRole


@dataclass(frozen=True)
class NoInputs:
    """Inputs of a stage that reads no other stages."""


def typed_inputs(function: Callable[..., Any], found: ArtifactsByRole) -> Any:
    """Convert the artifacts into the type of the function's parameter `inputs`.

    That type is a dataclass with a field for each role: `student: Model`, `cache: TeacherCache | None = None`, or, for
    a role that several stages fill, `models: Mapping[str, Model]` with their labels or names as keys.
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
    """Return the artifact class T of a hint T, T | None or Mapping[str, T]."""
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint
    inner = get_args(hint)
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        return _artifact_type(inner[1])
    return next(_artifact_type(one) for one in inner if one is not type(None))


def _as(kind: type[Artifact], artifact: Artifact) -> Artifact:
    return kind(**{field.name: getattr(artifact, field.name) for field in fields(Artifact)})
