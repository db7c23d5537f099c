"""What stages hand to each other: a published directory and the result in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Artifact:
    """The published output of one finished stage."""

    stage: str
    """Name of the stage in the recipe."""
    kind: str
    path: Path
    """Folder with manifest.json (an adopted model: the folder that was adopted)."""
    fingerprint: str
    result: Mapping[str, Any]
    """Small JSON facts that the stage returned: sizes, losses, counts."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Who made it, with what, how long it took."""


@dataclass(frozen=True)
class ArtifactsByRole:
    """A stage's inputs by role: `inputs["teacher"]`; roles with several stages: `inputs.many("models")`."""

    single: Mapping[str, Artifact] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Artifact]] = field(default_factory=dict)

    def __getitem__(self, role: str) -> Artifact:
        return self.single[role]

    def get(self, role: str) -> Artifact | None:
        return self.single.get(role)

    def many(self, role: str) -> Mapping[str, Artifact]:
        """Label -> artifact; lists of stages are labelled by stage name."""
        return self.groups.get(role, {})
