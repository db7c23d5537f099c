"""Keys of cache_teacher stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.training import TeacherCaching


class CacheTeacherInputs(Schema):
    """Stages that a cache_teacher stage reads."""

    teacher: StageName = "teacher"
    """Stage that provides the teacher."""
    data: StageName = "data"
    """Stage that provides the tokenized text."""
    check: StageName | None = "check_teacher"
    """Teacher check to wait for. null: none."""


class CacheTeacherStage(TeacherCaching, StageParams):
    """Write a part of the teacher's distributions to disk, so that `distill` needs no teacher in memory.

    The parallel layouts and batch sizes of the teacher and of the student are independent.
    """

    kind: Literal["cache_teacher"]
    inputs: CacheTeacherInputs = CacheTeacherInputs()
