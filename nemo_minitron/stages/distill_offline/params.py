"""Keys of distill_offline stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.alignment import Alignment
from nemo_minitron.schema.base import Schema, StageName, StageParams


class DistillOfflineInputs(Schema):
    """Stages that a distill_offline stage reads."""

    model: StageName = "prune"
    """Stage that provides the student."""
    teacher: StageName = "teacher"
    """Stage that provides the teacher."""
    chats: StageName = "chat_data"
    """Stage that provides the conversations."""


class DistillOfflineStage(Alignment, StageParams):
    """Distill on conversations from a teacher whose top logits are computed once and cached."""

    kind: Literal["distill_offline"]
    inputs: DistillOfflineInputs = DistillOfflineInputs()
    top_k: PositiveInt = 100
    """Teacher logits to keep for each token. The loss is over these alone, normalized to sum to 1."""
    kd_loss: Literal["fwd_kl", "bwd_kl"] = "fwd_kl"
    """Direction of the KL divergence."""
    kd_loss_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the distillation loss."""
    sft_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the next-token loss on the answers, added to the distillation loss."""
