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
    model: StageName = "teacher"
    data: StageName = "data"


class ScoreStage(Scoring, StageParams):
    """Importance of every axis (2407.14679, section 2.2). Forward passes only, except for `method: taylor`."""

    kind: Literal["score"]
    inputs: ScoreInputs = ScoreInputs()
