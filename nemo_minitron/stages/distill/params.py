"""Keys of distill stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.training import Distillation


class DistillInputs(Schema):
    """Stages that a distill stage reads."""

    student: StageName = "prune"
    """Stage that provides the student."""
    teacher: StageName = "teacher"
    """Stage that provides the teacher."""
    data: StageName = "data"
    """Stage that provides the tokenized text."""
    check: StageName | None = "check_teacher"
    """Teacher check to wait for. null: none."""
    cache: StageName | None = None
    """cache_teacher stage to learn from; the teacher is then not loaded. null: the live teacher."""
    plan: StageName | None = None
    """Stage that provides the plan by which the student was pruned, for `loss.anchors`. null: none."""


class DistillStage(Distillation, StageParams):
    """Train the student to match its teacher."""

    kind: Literal["distill"]
    inputs: DistillInputs = DistillInputs()
