"""Keys of chat_data stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Inputless, StageParams
from nemo_minitron.schema.chats import ChatRows


class ChatDataStage(ChatRows, StageParams):
    """Read public chat, preference or rating files into checked rows of one form, split into training and validation
    rows."""

    kind: Literal["chat_data"]
    inputs: Inputless = Inputless()
