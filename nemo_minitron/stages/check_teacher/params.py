"""Keys of check_teacher stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Precision, Schema, StageName, StageParams


class CheckTeacherInputs(Schema):
    teacher: StageName = "teacher"
    data: StageName = "data"


class CheckTeacherStage(StageParams):
    """Held-out loss of the teacher; a teacher above the bound stops the run before it costs anything."""

    kind: Literal["check_teacher"]
    inputs: CheckTeacherInputs = CheckTeacherInputs()
    max_loss: Annotated[float, Field(gt=0.0)]
    """Nats per token on the validation split."""
    num_tokens: PositiveInt = 16384
    seq_len_tokens: PositiveInt = 512
    precision: Precision = "bf16"
