"""Keys of sampling answers to prompts that request attributes."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from nemo_minitron.schema.base import TEMPLATE_DATE, Fraction, Precision, Schema, Seed
from nemo_minitron.schema.chats import AttributeName, TemplateName


class AnswerSampling(Schema):
    """How answers to prompts that request attributes are sampled and rendered."""

    attributes: dict[AttributeName, Annotated[int, Field(ge=0, le=4)]] = Field(default_factory=dict)
    """Values that every prompt requests. Empty: each prompt requests the ratings of its row."""
    answers_per_prompt: Annotated[int, Field(ge=2)] = 10
    """Answers to each prompt."""
    temperature: PositiveFloat = 0.7
    """Temperature of the sampling."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Sample each token from the most likely ones whose probabilities sum to this."""
    max_new_tokens: PositiveInt
    """Longest answer. An answer that does not end within it is sampled again."""
    max_attempts: PositiveInt = 3
    """How often a prompt is answered at most until it has enough usable answers; otherwise it is left out."""
    max_seq_len_tokens: PositiveInt
    """Longest prompt and answer together. A prompt that leaves no room for max_new_tokens is left out."""
    max_train_prompts: PositiveInt | None = None
    """Use at most this many training prompts, from the first. null: all."""
    max_valid_prompts: PositiveInt | None = None
    """Use at most this many held-out prompts, from the first. null: all."""
    batch_size: PositiveInt = 16
    """Answers to generate or to rate at a time; at least those of one prompt."""
    seed: Seed = 1234
    """Seed of the sampling."""
    precision: Precision = "fp32"
    """Floating-point format of the two language models."""
    template: TemplateName = "model"
    """Chat template. model: the one beside the tokenizer."""
    whole_markers: bool = True
    """Require that each marker of the template is a single token."""
    max_bad_fraction: Fraction = 0.0
    """Fraction of rows that may be unusable with this tokenizer. They are skipped and counted."""
    template_date: date = TEMPLATE_DATE
    """Date that a template writes; the same as in the training."""
