"""Keys of compensate stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.pruning import Compensation


class CompensateInputs(Schema):
    """Stages that a compensate stage reads."""

    teacher: StageName = "teacher"
    """Stage that provides the model before pruning."""
    student: StageName = "prune"
    """Stage that provides the pruned model."""
    plan: StageName = "select"
    """Select stage with the plan by which it was pruned."""
    data: StageName = "data"
    """Stage that provides the calibration text."""
    heldout: StageName | None = None
    """Stage that provides the held-out text, best of another kind than the calibration text. null: the held-out part
    of the calibration text."""


class CompensateStage(Compensation, StageParams):
    """Repair a pruned model by least squares: the kept weights take over what the cut ones did. No training."""

    kind: Literal["compensate"]
    inputs: CompensateInputs = CompensateInputs()
