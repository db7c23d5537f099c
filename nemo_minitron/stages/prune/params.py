"""Keys of prune stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams


class PruneInputs(Schema):
    """Stages that a prune stage reads."""

    model: StageName = "teacher"
    """Stage that provides the model to prune."""
    plan: StageName = "select"
    """Select stage that provides the plan."""


class PruneStage(StageParams):
    """Prune a Hugging Face checkpoint by plan into another Hugging Face checkpoint."""

    kind: Literal["prune"]
    inputs: PruneInputs = PruneInputs()
