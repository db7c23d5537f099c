"""Keys of distill_layers stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.training import LayerDistillation


class DistillLayersInputs(Schema):
    """Stages that a distill_layers stage reads."""

    student: StageName = "prune"
    """Stage that provides the student."""
    teacher: StageName = "teacher"
    """Stage that provides the teacher: the model that the plan prunes, corrected or not."""
    plan: StageName = "select"
    """Stage that provides the plan by which the student was pruned."""
    data: StageName = "data"
    """Stage that provides the tokenized text."""


class DistillLayersStage(LayerDistillation, StageParams):
    """Train every layer of a pruned student apart from the others: it gets the hidden states of the teacher and learns
    the teacher's output at the kept channels. Embeddings, final norm and head stay as they are."""

    kind: Literal["distill_layers"]
    inputs: DistillLayersInputs = DistillLayersInputs()
