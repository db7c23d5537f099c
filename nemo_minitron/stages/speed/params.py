"""Keys of speed stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.speed import SpeedMeasurement


class SpeedInputs(Schema):
    """Stages that a speed stage reads."""

    models: Annotated[dict[str, StageName], Field(min_length=1)]
    """Label -> stage that provides a model. All are timed in one process, interleaved."""


class SpeedStage(SpeedMeasurement, StageParams):
    """Measure the prefill and generation speed of several models side by side."""

    kind: Literal["speed"]
    inputs: SpeedInputs
