"""Keys of export stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams


class ExportInputs(Schema):
    """Stages that an export stage reads."""

    model: StageName = "distill"
    """Stage that provides the model."""
    teacher: StageName = "teacher"
    """Stage that provides the teacher, which the model card names."""
    evaluations: tuple[StageName, ...] = ()
    """Evaluations that the model card shows."""


class ExportStage(StageParams):
    """Write the finished model as plain `transformers` loads it, with a model card."""

    kind: Literal["export"]
    inputs: ExportInputs = ExportInputs()
    dtype: Literal["keep", "float32", "bfloat16"] = "bfloat16"
    """Format of the weights. keep: as stored."""
    model_name: str | None = None
    """Title of the model card. null: the recipe's name."""
