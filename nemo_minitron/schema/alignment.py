"""Keys that all alignment trainings share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Seed
from nemo_minitron.schema.chats import ChatRendering


class Alignment(ChatRendering):
    """What all trainings by NeMo-Aligner have."""

    num_epochs: PositiveInt = 1
    num_steps: PositiveInt | None = None
    """Optimizer steps, however many epochs they take; null: num_epochs decides."""
    global_batch_size: PositiveInt
    """Rows (pairs, for preferences) per optimizer step."""
    max_seq_len_tokens: PositiveInt
    lr: Annotated[float, Field(gt=0.0)]
    """Peak; a cosine leads from it to min_lr."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    valid_interval_steps: PositiveInt = 50
    """Also the interval of checkpoints."""
    seed: Seed = 1234
    aligner: dict[str, Any] = Field(default_factory=dict)
    """Any other key of NeMo-Aligner's config, nested as in configs/align; unknown ones are refused."""


class RewardTraining(Alignment):
    """How a reward model is trained."""

    reward: Literal["regression", "ranking"] = "regression"
    """regression: ratings of single answers, from conversations. ranking: the better of two answers, from pairs."""
