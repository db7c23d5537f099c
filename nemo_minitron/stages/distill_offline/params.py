"""Keys of distill_offline stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.alignment import Alignment
from nemo_minitron.schema.base import Schema, StageName, StageParams


class DistillOfflineInputs(Schema):
    model: StageName = "prune"
    """The student."""
    teacher: StageName = "teacher"
    chats: StageName = "chat_data"


class DistillOfflineStage(Alignment, StageParams):
    """Distillation on conversations from a teacher that is asked once: its top logits are cached."""

    kind: Literal["distill_offline"]
    inputs: DistillOfflineInputs = DistillOfflineInputs()
    top_k: PositiveInt = 100
    """Logits of the teacher that are kept of every token; the loss is over these alone, made to sum to 1."""
    kd_loss: Literal["fwd_kl", "bwd_kl"] = "fwd_kl"
    kd_loss_weight: Annotated[float, Field(ge=0.0)] = 1.0
    sft_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Of next-token loss on the answers, beside it."""
