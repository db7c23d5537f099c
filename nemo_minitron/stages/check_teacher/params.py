"""Keys of check_teacher stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Precision, Schema, StageName, StageParams


class CheckTeacherInputs(Schema):
    """Stages that a check_teacher stage reads."""

    teacher: StageName = "teacher"
    """Stage that provides the teacher."""
    data: StageName = "data"
    """Stage that provides the tokenized text."""


class CheckTeacherStage(StageParams):
    """Measure the teacher's held-out loss, and stop the run early if the teacher is too bad."""

    kind: Literal["check_teacher"]
    inputs: CheckTeacherInputs = CheckTeacherInputs()
    max_loss: Annotated[float, Field(gt=0.0)]
    """Highest loss that passes, in nats per token on the validation split."""
    num_tokens: PositiveInt = 16384
    """Held-out tokens to measure."""
    seq_len_tokens: PositiveInt = 512
    """Tokens in each sequence."""
    precision: Precision = "bf16"
    """Floating-point format of weights and activations."""
