"""Write report.json, report.md and report.html of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.run_paths import RunPaths
from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.report.params import ReportStage


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    stages: Mapping[str, Artifact]


def report(params: ReportStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Render the report of the finished stages."""
    from nemo_minitron.report.render import render

    plan = _read_plan(ctx)
    return render(params.title, inputs.stages, ctx.recipe_name, plan, ctx.out_dir)


def _read_plan(ctx: StageContext) -> dict[str, Any]:
    file = RunPaths(Path(ctx.execution.run_root) / ctx.recipe_name).plan
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
