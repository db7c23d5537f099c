"""Keys of annotate stages."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Fraction, Schema, StageName, StageParams
from nemo_minitron.schema.chats import AttributeName


class AnnotateInputs(Schema):
    attribute_model: StageName = "attribute_model"
    chats: StageName = "chat_data"


class AnnotateStage(StageParams):
    """Write down what an attribute model thinks of every answer, rounded to 0..4 (2310.05344, step 2)."""

    kind: Literal["annotate"]
    inputs: AnnotateInputs = AnnotateInputs()
    attributes: Annotated[tuple[AttributeName, ...], Field(min_length=1)] = get_args(AttributeName)
    """Which of them go into the rows."""
    keep_human: bool = True
    """Attributes that a row already has stay as they are."""
    max_seq_len_tokens: PositiveInt = 4096
    batch_size: PositiveInt = 8
    max_bad_fraction: Fraction = 0.0
    """Share of rows that may be unusable with the attribute model's tokenizer; they are left out and counted."""
