"""Keys of count_letters stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_minitron.schema.base import Schema, StageName, StageParams


class CountLettersInputs(Schema):
    model: StageName = "teacher"


class CountLettersStage(StageParams):
    """Count a letter in the vocabulary of a model."""

    kind: Literal["count_letters"]
    inputs: CountLettersInputs = CountLettersInputs()
    letter: Annotated[str, Field(min_length=1, max_length=1)] = "e"
    """The letter that is counted."""
