"""Keys of select stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.pruning import Selection


class SelectInputs(Schema):
    model: StageName = "teacher"
    scores: StageName | None = "score"
    """Needed for `method: importance` only."""
    search: StageName | None = None
    """A search stage whose winner gives the target."""


class SelectStage(Selection, StageParams):
    """Scores + target sizes -> prune_plan.json: which indices stay on each axis."""

    kind: Literal["select"]
    inputs: SelectInputs = SelectInputs()
