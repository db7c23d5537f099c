"""Keys of chat rows and of how they become training text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import TEMPLATE_DATE, Fraction, Precision, Schema, Seed

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


class ChatEvaluation(Schema):
    """What an aligned model is asked, and how held-out rows are rendered."""

    label: str
    """Row of the report."""
    template: TemplateName = "model"
    whole_markers: bool = True
    template_date: date = TEMPLATE_DATE
    """As of the stages that train: the day that a template writes."""
    max_rows: PositiveInt = 200
    """Held-out rows that are looked at, the first ones."""
    max_seq_len_tokens: PositiveInt = 1024
    """Longer rows are left out."""
    max_bad_fraction: Fraction = 0.0
    """Share of rows, and of instructions, that may be unusable with this tokenizer; they are left out and counted."""
    num_generated: Annotated[int, Field(ge=0)] = 0
    """Prompts of held-out conversations that the model answers itself: length, and exact match of final numbers."""
    vary_attribute: AttributeName | None = None
    """Ask for each of these prompts with this attribute at 0 to 4, and correlate the answers' lengths with it."""
    other_attributes: dict[AttributeName, Annotated[float, Field(ge=0.0, le=4.0)]] = Field(default_factory=dict)
    """What the prompt asks for besides."""
    prompts: tuple[str, ...] = ()
    """Questions whose answers the report shows."""
    instructions: str | None = None
    """Prompts with rules that a program can check, as IFEval has them: `asset:instructions`, or IFEval's own file."""
    max_instructions: PositiveInt = 600
    max_new_tokens: PositiveInt = 128
    precision: Precision = "fp32"


class ChatRows(Schema):
    """Which chat files are read, and how their rows are split."""

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


@dataclass(frozen=True)
class ChatRowFacts:
    """What is known about chat rows before they are made."""

    rows: RowKind
    valid_rows: int
    rated_from: str | None = None
    """Name of the stage whose rows these are, if this stage only rates them."""
