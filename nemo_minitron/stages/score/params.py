"""Keys of score stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import (
    Schema,
    StageName,
    StageParams,
)
from nemo_minitron.schema.pruning import Scoring


class ScoreInputs(Schema):
    """Stages that a score stage reads."""

    model: StageName = "teacher"
    """Stage that provides the model to score."""
    data: StageName = "data"
    """Stage that provides the calibration text."""


class ScoreStage(Scoring, StageParams):
    """Measure the importance of every axis (2407.14679, section 2.2). Only `method: taylor` needs backward passes."""

    kind: Literal["score"]
    inputs: ScoreInputs = ScoreInputs()
