"""Keys of the stages that train a model on rewards of its own answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from nemo_minitron.schema.base import Fraction, Schema, StageName, StageParams
from nemo_minitron.schema.rewards import RolloutTraining


class RolloutInputs(Schema):
    """Stages that a training on rewards reads."""

    model: StageName = "sft"
    """Stage that provides the model to start from."""
    chats: StageName = "chat_data"
    """Stage that provides the conversations; the model answers their last question."""
    reward_model: StageName | None = None
    """Stage that provides the reward model for rule reward_model."""


class ReinforceStage(RolloutTraining, StageParams):
    """Reinforcement learning on rewards of the model's own answers: REINFORCE with the mean reward of the other answers
    to a prompt as the baseline (RLOO, 2402.14740)."""

    kind: Literal["reinforce"]
    inputs: RolloutInputs = RolloutInputs()
    answers_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt of a step."""


class PpoStage(RolloutTraining, StageParams):
    """Reinforcement learning on rewards of the model's own answers: PPO (1707.06347) with a critic that starts from the
    model and is trained in a server of its own."""

    kind: Literal["ppo"]
    inputs: RolloutInputs = RolloutInputs()
    critic_lr: PositiveFloat
    """Peak learning rate of the critic. It falls along a cosine to critic_min_lr."""
    critic_min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate of the critic at the end."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps before the first one in which only the critic is trained, on new answers."""
    ratio_clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far the ratio of the probabilities of a token may move from 1 before its gradient is cut off."""
    value_clip: Annotated[float, Field(ge=0.0)] = 0.2
    """How far the critic's value of a token may move from that at the start of the step in its clipped loss. 0: no
    clipping."""
    discount_factor: Fraction = 1.0
    """Discount of later rewards."""
    gae_lambda: Fraction = 0.95
    """Decay of generalized advantage estimation (1506.02438)."""
    entropy_bonus: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the entropy, added to the objective."""

    @property
    def answers_per_prompt(self) -> int:
        """PPO has one answer to each prompt of a step."""
        return 1
