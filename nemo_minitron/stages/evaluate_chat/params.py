"""Keys of evaluate_chat stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.chats import ChatEvaluation


class EvaluateChatInputs(Schema):
    model: StageName
    chats: StageName = "chat_data"
    """Its held-out rows: pairs or conversations."""
    reference: StageName | None = None
    """Of preferences: what the model started from; null: the model's own log-probabilities decide."""


class EvaluateChatStage(ChatEvaluation, StageParams):
    """What an aligned model prefers and answers, on held-out rows."""

    kind: Literal["evaluate_chat"]
    inputs: EvaluateChatInputs
