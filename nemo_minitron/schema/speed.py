"""Keys of a speed measurement."""

from __future__ import annotations

from pydantic import PositiveInt

from nemo_minitron.schema.base import Precision, Schema


class SpeedMeasurement(Schema):
    """How prefill and generation speed are measured through transformers on this machine."""

    prompt_tokens: PositiveInt = 128
    """Tokens of the prompt."""
    new_tokens: PositiveInt = 32
    """Tokens to generate."""
    rounds: PositiveInt = 3
    """Repetitions."""
    precision: Precision = "bf16"
    """Floating-point format of weights and activations."""
