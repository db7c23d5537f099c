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
"""Attributes that raters score from 0 to 4, in NeMo-Aligner's order."""


RowKind = Literal["conversations", "pairs", "prompts"]


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
    "prompts",
    "result_place",
    "result_first",
]


TemplateName = Literal["chatml", "llama3", "extra_id", "model"]


class ChatSource(Schema):
    """One file, glob or folder of chat rows."""

    source: str
    """`asset:NAME`, or a path or glob of .jsonl, .json (a list) or .parquet files, each also compressed as .gz, .zst,
    .bz2 or .xz."""
    format: ChatFormat = "auto"
    """Format of the rows. auto: recognized by the keys of the first row."""
    max_rows: PositiveInt | None = None
    """Keep at most this many valid rows. null: all."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """How often each training row is written. 2: twice. 0.5: every second row, chosen by hash."""
    leave_out: tuple[str, ...] = ()
    """Fields of rows and messages to ignore, such as a long `context` or `tool_calls`."""
    attributes: dict[str, AttributeName | None] = Field(default_factory=dict)
    """Other names of attributes in these rows, such as {factuality: correctness}. null ignores one."""


class ChatRendering(Schema):
    """How chat rows become training text."""

    template: TemplateName = "model"
    """Chat template. model: the one beside the tokenizer."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation are learned; each becomes one training row."""
    condition_on_attributes: bool = True
    """Put the ratings of a row into the prompt before its last answer (SteerLM)."""
    max_seq_len_tokens: PositiveInt | None = None
    """Longest prompt and answer together. null: any length."""
    too_long: Literal["drop", "cut_turns"] = "drop"
    """What happens to longer rows. drop: they are skipped. cut_turns: they lose their oldest turns, and are skipped if
    that is not enough."""
    whole_markers: bool = True
    """Require that each marker of the template is a single token. false allows a tokenizer that spells them out, for
    experiments."""
    max_bad_fraction: Fraction = 0.0
    """Fraction of rows that may be unusable with this tokenizer."""
    template_date: date = TEMPLATE_DATE
    """Date that the templates of Llama 3.1 and later write into every text. It is fixed, so that rows do not depend on
    the day on which a stage runs."""


class ChatEvaluation(Schema):
    """Prompts that an aligned model answers, and how held-out rows are rendered."""

    label: str
    """Name of the model in the report."""
    template: TemplateName = "model"
    """Chat template. model: the one beside the tokenizer."""
    whole_markers: bool = True
    """Require that each marker of the template is a single token."""
    template_date: date = TEMPLATE_DATE
    """Date that a template writes; the same as in the training."""
    max_rows: PositiveInt = 200
    """Measure at most this many held-out rows, from the first."""
    max_seq_len_tokens: PositiveInt = 1024
    """Longest prompt and answer together; longer rows are skipped."""
    max_bad_fraction: Fraction = 0.0
    """Fraction of rows, and of instructions, that may be unusable with this tokenizer. They are skipped and counted."""
    num_generated: Annotated[int, Field(ge=0)] = 0
    """Number of prompts of held-out conversations that the model answers, to measure length and exact match of final
    numbers."""
    vary_attribute: AttributeName | None = None
    """Ask each of these prompts with this attribute at 0 to 4, and correlate the lengths of the answers with it. null:
    do not."""
    other_attributes: dict[AttributeName, Annotated[float, Field(ge=0.0, le=4.0)]] = Field(default_factory=dict)
    """Values of other attributes in the prompts."""
    prompts: tuple[str, ...] = ()
    """Questions whose answers the report shows."""
    instructions: str | None = None
    """Prompts with rules that a program can check, as in IFEval: `asset:instructions`, or IFEval's own file. null:
    none."""
    max_instructions: PositiveInt = 600
    """Use at most this many instructions."""
    max_new_tokens: PositiveInt = 128
    """Tokens to generate for each answer."""
    precision: Precision = "fp32"
    """Floating-point format of weights and activations."""


class ChatRows(Schema):
    """Which chat files are read, and how their rows are split."""

    rows: RowKind
    """Kind of rows. conversations: for fine-tuning and attribute models. pairs: a chosen and a rejected answer to each
    prompt. prompts: questions without answers, for trainings on rewards only."""
    sources: Annotated[tuple[ChatSource, ...], Field(min_length=1)]
    """The files."""
    valid_rows: Annotated[int, Field(ge=0)] = 100
    """Hold out at most this many rows. Rows that begin with the same question stay together."""
    seed: Seed = 1234
    """Seed of the random numbers that choose the held-out rows."""
    system: str | None = None
    """System text for rows that have none. null: none."""
    max_bad_fraction: Fraction = 0.0
    """Fraction of rows that may be invalid. They are skipped and listed in bad_rows.jsonl."""


@dataclass(frozen=True)
class ChatRowFacts:
    """What is known about chat rows before they are made."""

    rows: RowKind
    valid_rows: int
    rated_from: str | None = None
    """Name of the stage whose rows these are, if this stage only rates them."""
