"""Keys of select stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.pruning import Selection


class SelectInputs(Schema):
    """Stages that a select stage reads."""

    model: StageName = "teacher"
    """Stage that provides the model to prune."""
    scores: StageName | None = "score"
    """Stage that provides the scores; used with `method: importance` only."""
    search: StageName | None = None
    """Search stage whose winner gives the target sizes."""


class SelectStage(Selection, StageParams):
    """Turn scores and target sizes into prune_plan.json, which lists the indices that stay on each axis."""

    kind: Literal["select"]
    inputs: SelectInputs = SelectInputs()
