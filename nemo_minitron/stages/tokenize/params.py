"""Keys of tokenize stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_minitron.schema.base import Schema, Seed, StageName, StageParams
from nemo_minitron.schema.data import DataSource


class TokenizeInputs(Schema):
    """Stages that a tokenize stage reads."""

    tokenizer: StageName = "teacher"
    """Stage whose model has the tokenizer."""


class TokenizeStage(StageParams):
    """Turn text into Megatron's indexed datasets, split by document into training and validation data."""

    kind: Literal["tokenize"]
    inputs: TokenizeInputs = TokenizeInputs()
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """The text."""
    valid_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of the documents of each source that is held out for validation."""
    seed: Seed = 1234
    """Seed of the random numbers that choose the held-out documents."""
