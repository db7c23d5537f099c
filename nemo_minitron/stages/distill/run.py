"""Train the pruned student to match the teacher."""

from __future__ import annotations

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.common.training import distill_student
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.stages.kind import Result


def distill(params: DistillStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Distill from the teacher, or from its cached distributions.

    Raises:
        DataError: teacher, student and data do not share a tokenizer.
        NumericsError: the loss blew up, or became NaN or infinite.
        Interrupted: the run was asked to stop.
    """
    require_one_tokenizer(inputs, ("student", "teacher"), ctx)
    cache = inputs.get("cache")
    folder = None if cache is None else cache.path
    return distill_student(params, inputs["student"], inputs["teacher"], inputs["data"], ctx, cache=folder)
