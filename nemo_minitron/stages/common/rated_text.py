"""Texts that an attribute model rates."""

from __future__ import annotations

from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import rated_row
from nemo_minitron.data.chat.rows import ATTRIBUTES, Row
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.schema.chats import ChatRendering


def answer_text(row: Row, template: ChatTemplate, max_seq_len_tokens: int, stats: LengthStats) -> str | None:
    """Return the dialogue in the form that the attribute model was trained on; None if it is too long.

    Raises:
        BadRow: the template or the tokenizer of the attribute model cannot represent the row.
    """
    options = ChatRendering(turns="last", max_seq_len_tokens=max_seq_len_tokens)
    unrated = {**row, "attributes": {ATTRIBUTES[0]: 0}}  # the label is not used
    rendered = rated_row(unrated, template, options, stats)
    return None if rendered is None else str(rendered["text"])
