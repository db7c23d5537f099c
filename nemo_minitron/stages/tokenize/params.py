"""Keys of tokenize stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_minitron.schema.base import Schema, Seed, StageName, StageParams
from nemo_minitron.schema.data import DataSource


class TokenizeInputs(Schema):
    tokenizer: StageName = "teacher"


class TokenizeStage(StageParams):
    """Text -> Megatron indexed datasets, split into train and validation by document."""

    kind: Literal["tokenize"]
    inputs: TokenizeInputs = TokenizeInputs()
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    valid_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of the documents of each source that is held out."""
    seed: Seed = 1234
