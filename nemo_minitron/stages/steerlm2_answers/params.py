"""Keys of steerlm2_answers stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.answers import AnswerSampling
from nemo_minitron.schema.base import Schema, StageName, StageParams


class Steerlm2AnswersInputs(Schema):
    """Stages that a steerlm2_answers stage reads."""

    model: StageName = "steerlm_sft"
    """Stage that provides the SteerLM model Q'(y|a,x), which answers the prompts."""
    reference: StageName = "sft"
    """Stage that provides the model P(y|x), which was trained without attributes."""
    attribute_model: StageName = "attribute_model"
    """Stage that provides the attribute model, from which P(a|x,y) is computed."""
    chats: StageName = "annotate"
    """Stage that provides the conversations; their last questions are answered again."""


class Steerlm2AnswersStage(AnswerSampling, StageParams):
    """Sample several answers to each prompt from a SteerLM model, with the three log-probabilities that SteerLM 2.0
    needs (2406.08673, section 4.5)."""

    kind: Literal["steerlm2_answers"]
    inputs: Steerlm2AnswersInputs = Steerlm2AnswersInputs()
