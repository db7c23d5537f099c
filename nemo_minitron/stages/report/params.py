"""Keys of report stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Schema, StageName, StageParams


class ReportInputs(Schema):
    """Stages that a report stage reads."""

    stages: tuple[StageName, ...] | None = None
    """Stages that the report covers. null: every other stage of the recipe."""


class ReportStage(StageParams):
    """Write report.json, report.md and one self-contained report.html."""

    kind: Literal["report"]
    inputs: ReportInputs = ReportInputs()
    title: str | None = None
    """Title of the report. null: the recipe's name."""
