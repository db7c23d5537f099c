"""Keys of the stage that measures aligned models."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.config.schema.alignment import AttributeName, TemplateName
from nemo_minitron.config.schema.base import TEMPLATE_DATE, Fraction, Precision, Schema, StageName


class EvaluateChatInputs(Schema):
    model: StageName
    chats: StageName = "chat_data"
    """Its held-out rows: pairs or conversations."""
    reference: StageName | None = None
    """Of preferences: what the model started from; null: the model's own log-probabilities decide."""


class EvaluateChatStage(Schema):
    """What an aligned model prefers and answers, on held-out rows."""

    kind: Literal["evaluate_chat"]
    inputs: EvaluateChatInputs
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
