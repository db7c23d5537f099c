"""Keys of align stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_minitron.schema.alignment import Alignment, RewardTraining, RowTraining
from nemo_minitron.schema.base import Schema, StageName, StageParams


class SftInputs(Schema):
    """Stages that an sft stage reads."""

    model: StageName = "distill"
    """Stage that provides the model."""
    chats: StageName = "chat_data"
    """Stage that provides the conversations."""


class SftStage(Alignment, StageParams):
    """Supervised fine-tuning on conversations."""

    kind: Literal["sft"]
    inputs: SftInputs = SftInputs()
    condition_on_attributes: bool = False
    """Put the ratings of a row into the prompt before its last answer (SteerLM)."""


class SteerlmSftInputs(Schema):
    """Stages that a steerlm_sft stage reads."""

    model: StageName = "distill"
    """Stage that provides the model."""
    chats: StageName = "annotate"
    """Stage that provides the rated conversations."""


class SteerlmSftStage(Alignment, StageParams):
    """Supervised fine-tuning on conversations whose prompts carry the attributes of the answer (2310.05344, step 3)."""

    kind: Literal["steerlm_sft"]
    inputs: SteerlmSftInputs = SteerlmSftInputs()
    turns: Literal["all", "last"] = "last"
    """Which answers of a conversation are learned; each becomes one training row."""


class Steerlm2Inputs(Schema):
    """Stages that a steerlm2 stage reads."""

    model: StageName = "steerlm_sft"
    """Stage that provides the model to start from, usually the one that sampled the answers."""
    answers: StageName = "steerlm2_answers"
    """Stage that provides the sampled answers."""


class Steerlm2Stage(RowTraining, StageParams):
    """Train an attribute-conditioned model on weighted samples of its own answers (SteerLM 2.0, 2406.08673, section
    4.5)."""

    kind: Literal["steerlm2"]
    inputs: Steerlm2Inputs = Steerlm2Inputs()


class DpoInputs(Schema):
    """Stages that a dpo stage reads."""

    model: StageName = "sft"
    """Stage that provides the model, which is also the frozen reference."""
    chats: StageName = "preference_data"
    """Stage that provides the pairs."""


class DpoStage(Alignment, StageParams):
    """Preference optimization on pairs of answers."""

    kind: Literal["dpo"]
    inputs: DpoInputs = DpoInputs()
    preference_loss: Literal["dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"] = "dpo"
    """The loss. The rpo losses (2406.11704) need a reward for both answers of every pair; rpo_bwd_kl is the one of
    Nemotron-4."""
    beta: Annotated[float, Field(gt=0.0)] = 0.2
    """Strength of the penalty for moving away from the reference model; NeMo-Aligner's ref_policy_kl_penalty, with its
    default."""
    reward_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Factor eta on the difference of the rewards, for the rpo losses."""
    sft_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the next-token loss on the chosen answer, added to the preference loss."""
    average_log_probs: bool = False
    """Use the mean instead of the sum over the tokens of an answer."""


class AttributeModelInputs(Schema):
    """Stages that a train_attribute_model stage reads."""

    model: StageName = "distill"
    """Stage that provides the model to start from."""
    chats: StageName = "chat_data"
    """Stage that provides the rated conversations or the pairs."""


class AttributeModelStage(RewardTraining, StageParams):
    """Train a reward model: attributes by regression (from conversations), or the better of two answers by ranking
    (from pairs)."""

    kind: Literal["train_attribute_model"]
    inputs: AttributeModelInputs = AttributeModelInputs()
    turns: Literal["all", "last"] = "last"
    """Which answers of a conversation are learned; each becomes one training row."""
