"""Keys of score_reconstruction stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.pruning import ReconstructionScoring


class ScoreReconstructionInputs(Schema):
    """Stages that a score_reconstruction stage reads."""

    model: StageName = "teacher"
    """Stage that provides the model to score."""
    data: StageName = "data"
    """Stage that provides the calibration text."""


class ScoreReconstructionStage(ReconstructionScoring, StageParams):
    """Rank the indices of every axis for a cut that a compensate stage repairs. Layers have no score here."""

    kind: Literal["score_reconstruction"]
    inputs: ScoreReconstructionInputs = ScoreReconstructionInputs()
