"""Keys of train stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.training import TeacherCorrection, TextTraining


class TrainInputs(Schema):
    model: StageName = "teacher"
    data: StageName = "data"


class TrainStage(TextTraining, StageParams):
    """Train a model on the text itself, by next-token cross entropy."""

    kind: Literal["train"]
    inputs: TrainInputs = TrainInputs()


class CorrectStage(TeacherCorrection, TrainStage):
    """Teacher correction: train the unpruned teacher on the distillation data (2408.11796, section 2).

    It needs the teacher and the data alone: prune the teacher as it was, and distill from the corrected one. The paper
    found that to be as good as pruning the corrected one (figure 5), and the held-out loss over 6 % lower (figure 4).
    """

    kind: Literal["correct"]  # type: ignore[assignment]
