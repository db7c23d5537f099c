"""Keys of prune stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams


class PruneInputs(Schema):
    model: StageName = "teacher"
    plan: StageName = "select"


class PruneStage(StageParams):
    """Cut the model by plan: Hugging Face checkpoint in, Hugging Face checkpoint out."""

    kind: Literal["prune"]
    inputs: PruneInputs = PruneInputs()
