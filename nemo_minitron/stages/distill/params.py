"""Keys of distill stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.training import Distillation


class DistillInputs(Schema):
    student: StageName = "prune"
    teacher: StageName = "teacher"
    data: StageName = "data"
    check: StageName | None = "check_teacher"
    """Waits for this teacher check to pass; null: no check."""
    cache: StageName | None = None
    """Learn from what a cache_teacher stage wrote; the teacher is then not loaded."""


class DistillStage(Distillation, StageParams):
    """Train the student to match its teacher."""

    kind: Literal["distill"]
    inputs: DistillInputs = DistillInputs()
