"""Keys of init stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nemo_minitron.schema.base import Schema, Seed, StageName, StageParams
from nemo_minitron.schema.data import DataSource


class NewTokenizer(Schema):
    """A byte-level BPE tokenizer, trained on text."""

    vocab_size: Annotated[int, Field(ge=257)]
    """Number of tokens: 256 bytes, the end-of-text token, and merges."""
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Text that the tokenizer is trained on, all of it: weights are not used."""

    @model_validator(mode="after")
    def _no_weights(self) -> NewTokenizer:
        if any(source.weight != 1.0 for source in self.sources):
            raise ValueError("sources: a tokenizer is trained on all of its text; leave weight out")
        return self


class InitInputs(Schema):
    """Stages that an init stage reads."""

    like: StageName | None = None
    """Stage whose model gives the sizes and the tokenizer, for a random control of a pruned model."""


class InitStage(StageParams):
    """Make a model with random weights, to be trained from scratch."""

    kind: Literal["init"]
    inputs: InitInputs = InitInputs()
    architecture: dict[str, Any] | None = None
    """Keys of config.json, including `architectures` and the sizes. Give it with `tokenizer`, or give inputs.like
    instead."""
    tokenizer: NewTokenizer | None = None
    """The tokenizer to train for the new model. Give it with `architecture`."""
    init_std: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of all matrices. Matrices that write into the residual stream get init_std / sqrt(2 * layers),
    as in GPT-2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of the weights."""
    seed: Seed = 1234
    """Seed of the random numbers that fill the weights."""
    license: str | None = None
    """SPDX id for the model card of the exported model. null: that of inputs.like."""

    @model_validator(mode="after")
    def _one_origin(self) -> InitStage:
        given = self.architecture is not None and self.tokenizer is not None
        if given == (self.inputs.like is not None) or (self.architecture is None) != (self.tokenizer is None):
            raise ValueError("give architecture and tokenizer, or inputs.like")
        return self


SAME_VOCABULARY = "Set both vocab_size keys to the same value."


def vocabulary_problem(params: InitStage) -> str | None:
    """Return what is wrong if the sizes of the vocabulary in `architecture` and `tokenizer` differ; otherwise None."""
    if params.architecture is None or params.tokenizer is None:
        return None
    size, own = params.architecture.get("vocab_size"), params.tokenizer.vocab_size
    return None if size == own else f"The architecture has a vocabulary of {size}, the tokenizer one of {own}."
