"""Keys of align stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_minitron.schema.alignment import Alignment, RewardTraining
from nemo_minitron.schema.base import Schema, StageName, StageParams


class SftInputs(Schema):
    model: StageName = "distill"
    chats: StageName = "chat_data"


class SftStage(Alignment, StageParams):
    """Supervised fine-tuning on conversations."""

    kind: Literal["sft"]
    inputs: SftInputs = SftInputs()
    condition_on_attributes: bool = False


class SteerlmSftInputs(Schema):
    model: StageName = "distill"
    chats: StageName = "annotate"


class SteerlmSftStage(Alignment, StageParams):
    """Supervised fine-tuning on conversations whose answers are told their attributes first (2310.05344, step 3)."""

    kind: Literal["steerlm_sft"]
    inputs: SteerlmSftInputs = SteerlmSftInputs()
    turns: Literal["all", "last"] = "last"


class DpoInputs(Schema):
    model: StageName = "sft"
    """Start, and frozen reference."""
    chats: StageName = "preference_data"


class DpoStage(Alignment, StageParams):
    """Preference optimisation on pairs of answers."""

    kind: Literal["dpo"]
    inputs: DpoInputs = DpoInputs()
    preference_loss: Literal["dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"] = "dpo"
    """The RPOs (2406.11704) need a reward of both answers of every pair; rpo_bwd_kl is that of Nemotron-4."""
    beta: Annotated[float, Field(gt=0.0)] = 0.2
    """How dear it is to move away from the reference; NeMo-Aligner's ref_policy_kl_penalty and its default."""
    reward_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the RPOs: eta on the difference of the rewards."""
    sft_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Of next-token loss on the chosen answer, beside the preference loss."""
    average_log_probs: bool = False
    """Mean instead of sum over the tokens of an answer."""


class AttributeModelInputs(Schema):
    model: StageName = "distill"
    chats: StageName = "chat_data"


class AttributeModelStage(RewardTraining, StageParams):
    """A reward model: attributes by regression (conversations), or the better of two answers by ranking (pairs)."""

    kind: Literal["train_attribute_model"]
    inputs: AttributeModelInputs = AttributeModelInputs()
    turns: Literal["all", "last"] = "last"
