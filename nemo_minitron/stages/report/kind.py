"""The kind of stage that writes the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.stages.kind import Output, RecipeView, StageKind
from nemo_minitron.stages.report.params import ReportStage


def _used_inputs(name: str, params: ReportStage, inputs: Mapping[str, Any], view: RecipeView) -> Mapping[str, Any]:
    """Return the stages that the recipe names, by default all others."""
    if "stages" in inputs:
        return inputs
    others = [other for other, stage in view.stages.items() if not isinstance(stage, ReportStage)]
    return {**inputs, "stages": others}


REPORT = StageKind(
    name="report",
    params=ReportStage,
    run="nemo_minitron.stages.report.run:report",
    outputs=(Output.REPORT,),
    reads_results=True,
    copied_to_run="report.*",
    used_inputs=_used_inputs,
)
