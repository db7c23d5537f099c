"""Keys that all alignment trainings share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Schema, Seed
from nemo_minitron.schema.chats import ChatRendering


class RowTraining(Schema):
    """Keys of a training on rows by an alignment backend, without those that render the rows."""

    num_epochs: PositiveInt = 1
    """Passes over the rows."""
    num_steps: PositiveInt | None = None
    """Optimizer steps, however many epochs they take. null: num_epochs decides."""
    global_batch_size: PositiveInt
    """Rows per optimizer step: conversations, pairs for preferences, or prompts with all their answers for steerlm2."""
    max_seq_len_tokens: PositiveInt
    """Longest prompt and answer together."""
    lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate. It falls along a cosine to min_lr."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warmup."""
    valid_interval_steps: PositiveInt = 50
    """Steps between two validations; a checkpoint is written at each."""
    seed: Seed = 1234
    """Seed of the random numbers that order the rows."""
    aligner: dict[str, Any] = Field(default_factory=dict)
    """Any other key of NeMo-Aligner's config, nested as in configs/align. Unknown keys are refused."""


class Alignment(RowTraining, ChatRendering):
    """Keys that all alignment trainings on chat rows share."""

    max_seq_len_tokens: PositiveInt
    """Longest prompt and answer together."""


class RewardTraining(Alignment):
    """How a reward model is trained."""

    reward: Literal["regression", "ranking"] = "regression"
    """regression: learn ratings of single answers, from conversations. ranking: learn which of two answers is better,
    from pairs."""
