"""Keys of the stages that NeMo-Aligner runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveInt

from nemo_minitron.config.schema.alignment import AttributeName, ChatRendering
from nemo_minitron.config.schema.base import Fraction, Schema, Seed, StageName


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


class SftInputs(Schema):
    model: StageName = "distill"
    chats: StageName = "chat_data"


class SftStage(Alignment):
    """Supervised fine-tuning on conversations."""

    kind: Literal["sft"]
    inputs: SftInputs = SftInputs()
    condition_on_attributes: bool = False


class SteerlmSftInputs(Schema):
    model: StageName = "distill"
    chats: StageName = "annotate"


class SteerlmSftStage(Alignment):
    """Supervised fine-tuning on conversations whose answers are told their attributes first (2310.05344, step 3)."""

    kind: Literal["steerlm_sft"]
    inputs: SteerlmSftInputs = SteerlmSftInputs()
    turns: Literal["all", "last"] = "last"


class DpoInputs(Schema):
    model: StageName = "sft"
    """Start, and frozen reference."""
    chats: StageName = "preference_data"


class DpoStage(Alignment):
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


class DistillOfflineInputs(Schema):
    model: StageName = "prune"
    """The student."""
    teacher: StageName = "teacher"
    chats: StageName = "chat_data"


class DistillOfflineStage(Alignment):
    """Distillation on conversations from a teacher that is asked once: its top logits are cached."""

    kind: Literal["distill_offline"]
    inputs: DistillOfflineInputs = DistillOfflineInputs()
    top_k: PositiveInt = 100
    """Logits of the teacher that are kept of every token; the loss is over these alone, made to sum to 1."""
    kd_loss: Literal["fwd_kl", "bwd_kl"] = "fwd_kl"
    kd_loss_weight: Annotated[float, Field(ge=0.0)] = 1.0
    sft_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Of next-token loss on the answers, beside it."""


class AttributeModelInputs(Schema):
    model: StageName = "distill"
    chats: StageName = "chat_data"


class AttributeModelStage(Alignment):
    """A reward model: attributes by regression (conversations), or the better of two answers by ranking (pairs)."""

    kind: Literal["train_attribute_model"]
    inputs: AttributeModelInputs = AttributeModelInputs()
    reward: Literal["regression", "ranking"] = "regression"
    turns: Literal["all", "last"] = "last"


class AnnotateInputs(Schema):
    attribute_model: StageName = "attribute_model"
    chats: StageName = "chat_data"


class AnnotateStage(Schema):
    """Write down what an attribute model thinks of every answer, rounded to 0..4 (2310.05344, step 2)."""

    kind: Literal["annotate"]
    inputs: AnnotateInputs = AnnotateInputs()
    attributes: Annotated[tuple[AttributeName, ...], Field(min_length=1)] = get_args(AttributeName)
    """Which of them go into the rows."""
    keep_human: bool = True
    """Attributes that a row already has stay as they are."""
    max_seq_len_tokens: PositiveInt = 4096
    batch_size: PositiveInt = 8
    max_bad_fraction: Fraction = 0.0
    """Share of rows that may be unusable with the attribute model's tokenizer; they are left out and counted."""
