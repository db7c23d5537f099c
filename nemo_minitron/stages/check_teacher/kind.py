"""The kind of stage that measures the teacher, and stops the run if its loss is too high."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.check_teacher.params import CheckTeacherStage
from nemo_minitron.stages.kind import HeldoutUse, Output, RecipeView, StageKind
from nemo_minitron.workload.load import EVAL_BATCH_SIZE, Load, forward_load


def _heldout_uses(params: CheckTeacherStage) -> Iterator[HeldoutUse]:
    yield HeldoutUse(params.inputs.data, params.num_tokens, "num_tokens")


def _load(name: str, params: CheckTeacherStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape, keys = view.shape(params.inputs.teacher), (params.seq_len_tokens, params.precision, layout)
    return None if shape is None else forward_load(shape, params.num_tokens, *keys, batch_size=EVAL_BATCH_SIZE)


CHECK_TEACHER = StageKind(
    name="check_teacher",
    params=CheckTeacherStage,
    run="nemo_minitron.stages.check_teacher.run:check_teacher",
    outputs=(Output.TEACHER_CHECK,),
    inputs={"teacher": (Output.MODEL,), "data": (Output.TOKENIZED_TEXT,)},
    distributed=True,
    heldout_uses=_heldout_uses,
    load=_load,
)
