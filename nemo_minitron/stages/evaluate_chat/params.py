"""Keys of evaluate_chat stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.chats import ChatEvaluation


class EvaluateChatInputs(Schema):
    """Stages that an evaluate_chat stage reads."""

    model: StageName
    """Stage that provides the model."""
    chats: StageName = "chat_data"
    """Stage that provides the held-out rows, pairs or conversations."""
    reference: StageName | None = None
    """For preferences, the model that the training started from. null: the model's own log-probabilities decide."""


class EvaluateChatStage(ChatEvaluation, StageParams):
    """Measure what an aligned model prefers and answers, on held-out rows."""

    kind: Literal["evaluate_chat"]
    inputs: EvaluateChatInputs
