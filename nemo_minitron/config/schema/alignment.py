"""Keys of the stages that bring chats, preferences and ratings into a run, and how they become text."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.config.schema.base import TEMPLATE_DATE, Fraction, Inputless, Schema, Seed

AttributeName = Literal[
    "quality",
    "toxicity",
    "humor",
    "creativity",
    "helpfulness",
    "correctness",
    "coherence",
    "complexity",
    "verbosity",
]
"""What raters score from 0 to 4, in NeMo-Aligner's order."""
RowKind = Literal["conversations", "pairs"]
ChatFormat = Literal[
    "auto",
    "messages",
    "sharegpt",
    "prompt_completion",
    "chosen_answers",
    "rejected_answers",
    "gsm8k",
    "helpsteer",
    "oasst",
    "pairs",
    "hh",
    "worked_answers",
]
TemplateName = Literal["chatml", "llama3", "extra_id", "model"]


class ChatSource(Schema):
    """One file, glob or folder of chat rows."""

    source: str
    """`asset:NAME`, or a path or glob of .jsonl, .json (a list), .parquet, each also as .gz or .zst."""
    format: ChatFormat = "auto"
    """auto: from the keys of the first row."""
    max_rows: PositiveInt | None = None
    """Of the good rows, the first so many."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """How often each training row is written: 2 twice, 0.5 every second one, chosen by hash."""
    leave_out: tuple[str, ...] = ()
    """Fields to ignore, of rows and of their messages, such as a long `context` or `tool_calls`."""
    attributes: dict[str, AttributeName | None] = Field(default_factory=dict)
    """Other names of attributes in these rows: {factuality: correctness}; null leaves one out."""


class ChatDataStage(Schema):
    """Public chat, preference or rating files -> checked rows of one form, split into train and validation."""

    kind: Literal["chat_data"]
    inputs: Inputless = Inputless()
    rows: RowKind
    """conversations: for SFT and attribute models; pairs: chosen and rejected answers to a prompt."""
    sources: Annotated[tuple[ChatSource, ...], Field(min_length=1)]
    valid_rows: Annotated[int, Field(ge=0)] = 100
    """Held out, at most: rows that begin with the same question stay together."""
    seed: Seed = 1234
    """Of the choice of the held-out rows."""
    system: str | None = None
    """System text of rows that have none."""
    max_bad_fraction: Fraction = 0.0
    """Share of rows that may be bad; they are left out and listed in bad_rows.jsonl."""


class ChatRendering(Schema):
    """How rows become training text."""

    template: TemplateName = "model"
    """model: the chat template beside the tokenizer."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation are learnt: one training row each."""
    condition_on_attributes: bool = True
    """SFT: the ratings of a row stand before its last answer, in the prompt (SteerLM)."""
    max_seq_len_tokens: PositiveInt | None = None
    """Longest prompt and answer together; null: any."""
    too_long: Literal["drop", "cut_turns"] = "drop"
    """What happens to a longer row: it is dropped, or loses its oldest turns (and is dropped if that is not enough)."""
    whole_markers: bool = True
    """The template's markers must be single tokens; false lets a tokenizer spell them out, for trials."""
    max_bad_fraction: Fraction = 0.0
    """Share of rows that may be unusable with this tokenizer."""
    template_date: date = TEMPLATE_DATE
    """The day that templates of Llama 3.1 and later write into every text: always the same, so that rows do not
    depend on when a stage runs."""
