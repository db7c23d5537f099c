"""Stages by the section of the report to which their kind belongs."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.stages.registry import STAGES


def in_section(stages: Sequence[Artifact], *sections: str) -> list[Artifact]:
    """Return the stages whose kind belongs to one of these sections."""
    return [stage for stage in stages if stage.kind in STAGES and STAGES[stage.kind].report in sections]
