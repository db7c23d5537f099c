"""Keys of reinforce stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.rewards import RolloutTraining


class ReinforceInputs(Schema):
    """Stages that a reinforce stage reads."""

    model: StageName = "sft"
    """Stage that provides the model to start from."""
    chats: StageName = "chat_data"
    """Stage that provides the conversations; the model answers their last question."""


class ReinforceStage(RolloutTraining, StageParams):
    """Reinforcement learning on rewards of the model's own answers: REINFORCE with the mean reward of the other answers
    to a prompt as the baseline (RLOO, 2402.14740)."""

    kind: Literal["reinforce"]
    inputs: ReinforceInputs = ReinforceInputs()
    answers_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt of a step."""
