"""Keys of a speed measurement."""

from __future__ import annotations

from pydantic import PositiveInt

from nemo_minitron.schema.base import Precision, Schema


class SpeedMeasurement(Schema):
    """Prefill and generation speed through transformers on this machine."""

    prompt_tokens: PositiveInt = 128
    new_tokens: PositiveInt = 32
    rounds: PositiveInt = 3
    precision: Precision = "bf16"
