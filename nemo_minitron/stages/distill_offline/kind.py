"""The kind of stage that distills on conversations from cached logits of a teacher."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.backends.alignment.rules import (
    CHAT_SEQ_MULTIPLE,
    model_problems,
    option_problems,
    row_problems,
    sequence_problems,
    size_problems,
)
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.distill_offline.params import DistillOfflineStage
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, StageKind
from nemo_minitron.workload.load import Load, alignment_load


def _shape(name: str, params: DistillOfflineStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.model)


def _problems(name: str, params: DistillOfflineStage, view: RecipeView) -> Iterator[str]:
    key, chats, layout = f"stages.{name}", params.inputs.chats, view.layout(name)
    student = view.shape(params.inputs.model)
    yield from option_problems(key, params, "knowledge_distillation")
    yield from row_problems(key, params, chats, view.chat_rows(chats), "conversations")
    yield from size_problems(key, params, layout)
    yield from sequence_problems(key, params.max_seq_len_tokens, layout, CHAT_SEQ_MULTIPLE)
    yield from _teacher(key, params, student, layout, view)
    yield from model_problems(key, student, layout)


def _teacher(
    key: str, params: DistillOfflineStage, student: ModelShape | None, layout: Parallel, view: RecipeView
) -> Iterator[str]:
    if not (params.kd_loss_weight or params.sft_loss_weight):
        yield f"{key}: kd_loss_weight and sft_loss_weight are both 0."
    teacher = view.shape(params.inputs.teacher)
    if teacher is None:
        return
    yield from model_problems(f"{key}.inputs.teacher", teacher, layout)
    if params.top_k > teacher.vocab_size:
        yield f"{key}.top_k = {params.top_k}: the teacher's vocabulary has {teacher.vocab_size} tokens."
    if teacher.vocab_size % layout.tp:
        yield f"{key}: tp = {layout.tp}: must divide the vocabulary, {teacher.vocab_size}; top_k would hold padding."
    if student is not None and student.vocab_size != teacher.vocab_size:
        yield f"{key}: the student's vocabulary has {student.vocab_size} tokens, the teacher's {teacher.vocab_size}."


def _load(name: str, params: DistillOfflineStage, layout: Parallel, view: RecipeView) -> Load | None:
    """Return the load of the training, without the teacher's pass before it."""
    shape = view.shape(params.inputs.model)
    if shape is None or params.num_steps is None:
        return None
    return alignment_load(shape, params.num_steps, params.global_batch_size, params.max_seq_len_tokens, layout)


DISTILL_OFFLINE = StageKind(
    name="distill_offline",
    params=DistillOfflineStage,
    run="nemo_minitron.stages.distill_offline.run:distill_offline",
    outputs=(Output.MODEL,),
    inputs={"model": MODELS, "teacher": (Output.MODEL,), "chats": (Output.CHAT_ROWS,)},
    starts_ranks=True,
    needs_aligner=True,
    whole_sequences=True,
    trains=True,
    report="alignment",
    chat_rank=4,
    version=2,
    shape=_shape,
    problems=_problems,
    load=_load,
)
