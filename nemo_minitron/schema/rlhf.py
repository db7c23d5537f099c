"""Keys of `minitron rlhf`: PPO and REINFORCE in a container."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from nemo_minitron.schema.base import TEMPLATE_DATE, Fraction, Schema
from nemo_minitron.schema.chats import AttributeName, TemplateName
from nemo_minitron.schema.rewards import HELPSTEER2_WEIGHTS

Rate = Annotated[float, Field(ge=0.0)]


class RlhfLayout(Schema):
    """GPUs of one of the two programs; its data-parallel size is the number of GPUs divided by tp * pp."""

    num_nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 8
    tp: PositiveInt = 1
    pp: PositiveInt = 1

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def dp(self) -> int:
        """Data-parallel size, rounded down where tp * pp does not divide the GPUs."""
        return self.world_size // (self.tp * self.pp)


class Rlhf(Schema):
    """Reinforcement learning of a finished model against a reward model, by NeMo-Aligner's own scripts."""

    algorithm: Literal["ppo", "reinforce"]
    num_steps: PositiveInt = 100
    """Number of steps; each has rollouts of num_rollout_prompts, and optimizer steps on all of them."""
    num_rollout_prompts: PositiveInt = 512
    rollouts_per_prompt: PositiveInt = 4
    """Answers to a prompt in REINFORCE; the others are the baseline of each. PPO has one answer to a prompt."""
    rollout_micro_batch_size: PositiveInt = 8
    num_valid_prompts: PositiveInt = 64
    valid_interval_steps: PositiveInt = 10
    """Steps between two validations; a checkpoint is written at each."""
    global_batch_size: PositiveInt = 64
    """Rollouts of an optimizer step."""
    micro_batch_size: PositiveInt = 1
    max_seq_len_tokens: PositiveInt = 4096
    max_new_tokens: PositiveInt = 1024
    kl_penalty: Rate = 0.01
    """Factor of the penalty for moving away from the model at the start."""
    temperature: PositiveFloat = 1.0
    lr: PositiveFloat = 9e-7
    min_lr: Rate = 9e-8
    critic_lr: PositiveFloat = 9e-6
    critic_min_lr: Rate = 9e-7
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Optimizer steps of linear warmup, of actor and critic."""
    attribute_weights: dict[AttributeName, float] = Field(default_factory=lambda: dict(HELPSTEER2_WEIGHTS))
    """Weights of the attributes in the reward (2406.08673, for its 70B model). A ranking reward model ignores them."""
    template: TemplateName = "model"
    whole_markers: bool = True
    """Refuse a tokenizer that spells the template's markers out."""
    template_date: date = TEMPLATE_DATE
    """Date that a template writes into the prompts."""
    max_bad_fraction: Fraction = 0.0
    """Fraction of rows that may be unusable with this tokenizer. They are skipped."""
    trt_llm: bool = True
    """Generate answers with TensorRT-LLM; otherwise with NeMo, which is much slower."""
    actor_layout: RlhfLayout = RlhfLayout()
    server_layout: RlhfLayout = RlhfLayout()
    server_host: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "localhost"
    """Host on which the actor reaches the server of the reward model."""
    server_port: Annotated[int, Field(ge=1, le=65535)] = 5556
    actor: dict[str, Any] = Field(default_factory=dict)
    """Any other key of configs/align/ppo_actor.yaml or reinforce_actor.yaml; unknown ones are refused."""
    server: dict[str, Any] = Field(default_factory=dict)
    """Any other key of configs/align/ppo_critic.yaml or reward_server.yaml."""
