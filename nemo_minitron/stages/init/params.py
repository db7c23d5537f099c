"""Keys of init stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nemo_minitron.schema.base import Schema, Seed, StageName, StageParams
from nemo_minitron.schema.data import DataSource


class NewTokenizer(Schema):
    """A byte-level BPE, trained on text."""

    vocab_size: Annotated[int, Field(ge=257)]
    """The 256 bytes, the end-of-text token, and merges."""
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]


class InitInputs(Schema):
    like: StageName | None = None
    """A model whose sizes and tokenizer are taken: the random control of a pruned model."""


class InitStage(StageParams):
    """A model with random weights, to be trained from nothing."""

    kind: Literal["init"]
    inputs: InitInputs = InitInputs()
    architecture: dict[str, Any] | None = None
    """Keys of config.json, `architectures` and the sizes among them; without inputs.like."""
    tokenizer: NewTokenizer | None = None
    """Goes with architecture."""
    init_std: Annotated[float, Field(gt=0.0)] = 0.02
    """Of all matrices; those that write into the residual stream get init_std / sqrt(2 * layers), as in GPT-2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 1234
    license: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> InitStage:
        given = self.architecture is not None and self.tokenizer is not None
        if given == (self.inputs.like is not None) or (self.architecture is None) != (self.tokenizer is None):
            raise ValueError("give architecture and tokenizer, or inputs.like")
        return self
