"""Keys of annotate stages."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Fraction, Schema, StageName, StageParams
from nemo_minitron.schema.chats import AttributeName


class AnnotateInputs(Schema):
    """Stages that an annotate stage reads."""

    attribute_model: StageName = "attribute_model"
    """Stage that provides the attribute model."""
    chats: StageName = "chat_data"
    """Stage that provides the conversations."""


class AnnotateStage(StageParams):
    """Add the ratings that an attribute model gives to every answer, rounded to 0..4 (2310.05344, step 2)."""

    kind: Literal["annotate"]
    inputs: AnnotateInputs = AnnotateInputs()
    attributes: Annotated[tuple[AttributeName, ...], Field(min_length=1)] = get_args(AttributeName)
    """Attributes to write into the rows."""
    keep_human: bool = True
    """Keep the ratings that a row already has."""
    max_seq_len_tokens: PositiveInt = 4096
    """Longest prompt and answer together; longer rows are skipped."""
    batch_size: PositiveInt = 8
    """Rows in each forward pass."""
    max_bad_fraction: Fraction = 0.0
    """Fraction of rows that may be unusable with the attribute model's tokenizer. They are skipped and counted."""
