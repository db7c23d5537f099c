"""Inputs and outputs of stages: a published folder and the result in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Artifact:
    """Published output of one finished stage."""

    stage: str
    """Name of the stage in the recipe."""
    kind: str
    path: Path
    """Folder with manifest.json; for an adopted model, the folder of the model."""
    fingerprint: str
    result: Mapping[str, Any]
    """Small JSON facts that the stage returned: sizes, losses, counts."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Software versions, command, times and duration; see `manifest.provenance`."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Role -> name(s) of the stages that it read."""


@dataclass(frozen=True)
class ArtifactsByRole:
    """Inputs of a stage by role: `inputs["teacher"]`, or `inputs.many("models")` for a role with several stages."""

    single: Mapping[str, Artifact] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Artifact]] = field(default_factory=dict)

    def __getitem__(self, role: str) -> Artifact:
        return self.single[role]

    def get(self, role: str) -> Artifact | None:
        return self.single.get(role)

    def many(self, role: str) -> Mapping[str, Artifact]:
        """Return label -> artifact. Lists of stages are labeled by stage name."""
        return self.groups.get(role, {})
