"""Keys of export stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams


class ExportInputs(Schema):
    model: StageName = "distill"
    teacher: StageName = "teacher"
    evaluations: tuple[StageName, ...] = ()


class ExportStage(StageParams):
    """The finished model as plain `transformers` loads it, with a model card."""

    kind: Literal["export"]
    inputs: ExportInputs = ExportInputs()
    dtype: Literal["keep", "float32", "bfloat16"] = "bfloat16"
    model_name: str | None = None
    """Title of the model card; the recipe's name when None."""
