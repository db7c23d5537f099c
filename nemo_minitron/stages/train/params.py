"""Keys of train stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.training import TeacherCorrection, TextTraining


class TrainInputs(Schema):
    """Stages that a train or correct stage reads."""

    model: StageName = "teacher"
    """Stage that provides the model."""
    data: StageName = "data"
    """Stage that provides the tokenized text."""


class TrainStage(TextTraining, StageParams):
    """Train a model on text by next-token cross entropy."""

    kind: Literal["train"]
    inputs: TrainInputs = TrainInputs()


class CorrectStage(TeacherCorrection, TrainStage):
    """Teacher correction: train the unpruned teacher on the distillation data (2408.11796, section 2).

    The stage needs only the teacher and the data: prune the original teacher, and distill from the corrected one. The
    paper found this as good as pruning the corrected teacher (figure 5), and the held-out loss over 6% lower (figure
    4).
    """

    kind: Literal["correct"]  # type: ignore[assignment]
