"""Keys of cache_teacher stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.training import TeacherCaching


class CacheTeacherInputs(Schema):
    teacher: StageName = "teacher"
    data: StageName = "data"
    check: StageName | None = "check_teacher"


class CacheTeacherStage(TeacherCaching, StageParams):
    """Write a part of the teacher's distributions to disk, sample by sample; `distill` then needs no teacher.

    The teacher's layout, the student's, and both batch sizes are free.
    """

    kind: Literal["cache_teacher"]
    inputs: CacheTeacherInputs = CacheTeacherInputs()
