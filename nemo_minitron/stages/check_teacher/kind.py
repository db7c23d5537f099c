"""The kind of stage that measures the teacher, and stops the run if its loss is too high."""

from __future__ import annotations

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.check_teacher.params import CheckTeacherStage
from nemo_minitron.stages.kind import Output, RecipeView, StageKind, measured_text
from nemo_minitron.workload.heldout import heldout_batch_size
from nemo_minitron.workload.load import Load, forward_load


def _load(name: str, params: CheckTeacherStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape, keys = view.shape(params.inputs.teacher), (params.seq_len_tokens, params.precision, layout)
    batch_size = heldout_batch_size(params.seq_len_tokens)
    return None if shape is None else forward_load(shape, params.num_tokens, *keys, batch_size=batch_size)


CHECK_TEACHER = StageKind(
    name="check_teacher",
    params=CheckTeacherStage,
    run="nemo_minitron.stages.check_teacher.run:check_teacher",
    outputs=(Output.TEACHER_CHECK,),
    inputs={"teacher": (Output.MODEL,), "data": (Output.TOKENIZED_TEXT,)},
    distributed=True,
    heldout_uses=measured_text,
    load=_load,
)
