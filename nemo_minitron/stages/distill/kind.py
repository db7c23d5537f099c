"""The kind of stage that trains a student to match its teacher."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import TeacherCaching
from nemo_minitron.schema.training_rules import learning_rate_problems, training_problems
from nemo_minitron.stages.common.hidden_rules import hidden_problems
from nemo_minitron.stages.common.plan_rules import plan_problems
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.stages.kind import Output, RecipeView, StageKind, trained_tokens, training_text, validation_text
from nemo_minitron.workload.load import Load, distillation_load


def _shape(name: str, params: DistillStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.student)


def _problems(name: str, params: DistillStage, view: RecipeView) -> Iterator[str]:
    yield from training_problems(name, params, params.num_steps, view.layout(name))
    yield from _correction(f"stages.{name}", params)
    yield from _anchors(name, params, view)
    yield from _fp8(f"stages.{name}.teacher_fp8", params)
    teacher, student = view.shape(params.inputs.teacher), view.shape(params.inputs.student)
    yield from hidden_problems(f"stages.{name}.loss", params.loss, teacher, student)
    cache = view.stages.get(params.inputs.cache or "")
    if isinstance(cache, TeacherCaching):
        yield from _cached(f"stages.{name}", params, params.inputs.cache or "", cache)
        yield from _vocabulary(f"stages.{name}.inputs.cache = {params.inputs.cache}", teacher, student)


def _correction(key: str, params: DistillStage) -> Iterator[str]:
    """Check the keys of teacher correction, which needs a teacher in memory and a loss that uses it."""
    if params.teacher_correction is None:
        return
    rate = params.teacher_correction
    yield from learning_rate_problems(f"{key}.teacher_correction", rate, params.num_steps, "num_steps")
    if params.inputs.cache is not None:
        yield f"{key}.teacher_correction: a cached teacher cannot be trained. Next: set inputs.cache: null."
    if not params.loss.needs_teacher:
        yield f"{key}.teacher_correction: the loss does not use the teacher. Next: remove this key."


def _anchors(name: str, params: DistillStage, view: RecipeView) -> Iterator[str]:
    """Check the keys of anchors, which need the plan and a live teacher that stays fixed."""
    key, plan, anchors = f"stages.{name}", params.inputs.plan, params.loss.anchors
    if anchors is None:
        if plan is not None:
            yield f"{key}.inputs.plan = {plan}: only loss.anchors reads it. Next: set it to null, or set loss.anchors."
        return
    if plan is None:
        yield f"{key}.loss.anchors: needs {key}.inputs.plan, the plan by which the student was pruned."
    else:
        yield from plan_problems(name, plan, params.inputs.teacher, params.inputs.student, view)
    if params.inputs.cache is not None:
        yield f"{key}.loss.anchors: the cache has no outputs of layers. Next: set inputs.cache: null."
    if params.teacher_correction is not None:
        yield f"{key}.loss.anchors: not supported with teacher_correction. Next: use a correct stage before."
    if (anchors.decay_steps or 0) > params.num_steps:
        yield f"{key}.loss.anchors.decay_steps = {anchors.decay_steps}: above num_steps = {params.num_steps}."


def _fp8(key: str, params: DistillStage) -> Iterator[str]:
    """Check that a teacher in FP8 is live, fixed, used, and otherwise in bf16."""
    if params.teacher_fp8 is None:
        return
    if params.inputs.cache is not None:
        yield f"{key}: a cached teacher is not run. Next: set inputs.cache: null."
    if params.teacher_correction is not None:
        yield f"{key}: a teacher that is trained needs bf16. Next: remove this key, or teacher_correction."
    if not params.loss.needs_teacher:
        yield f"{key}: the loss does not use the teacher. Next: remove this key."
    if params.precision != "bf16":
        yield f"{key}: the rest of the model must be in bf16. Next: set precision: bf16."


def _cached(key: str, params: DistillStage, name: str, cache: TeacherCaching) -> Iterator[str]:
    """Check that the cache of a teacher contains everything that the distillation reads."""
    loss = params.loss
    if params.num_steps * params.global_batch_size > cache.num_samples:
        yield (
            f"stages.{name}.num_samples = {cache.num_samples}: {key} reads num_steps * global_batch_size = "
            f"{params.num_steps * params.global_batch_size} samples."
        )
    for role in ("teacher", "data"):
        own, cached = getattr(params.inputs, role), getattr(cache.inputs, role)  # type: ignore[attr-defined]
        if own != cached:
            yield f"{key}.inputs.{role} = {own}: stages.{name} uses {cached}; both must be the same."
    for field in ("seq_len_tokens", "seed", "reset_attention_mask"):
        if getattr(params, field) != getattr(cache, field):
            other = f"stages.{name} has {getattr(cache, field)}"
            yield f"{key}.{field} = {getattr(params, field)}: {other}; both must be the same."
    if loss.hidden is not None:
        yield f"{key}.loss.hidden: the cache has no hidden states. Next: set inputs.cache: null."
    if loss.logits is None:
        yield f"{key}.inputs.cache: the loss does not use logits. Next: set inputs.cache: null."
    elif loss.logits.sparse != cache.sparse or loss.logits.temperature != cache.temperature:
        yield (
            f"{key}.loss.logits: sparse and temperature must be the same as in stages.{name}: "
            f"sparse = {cache.sparse.model_dump(mode='json')}, temperature = {cache.temperature}."
        )


def _vocabulary(key: str, teacher: ModelShape | None, student: ModelShape | None) -> Iterator[str]:
    """Check that the student has all tokens that are in the cache of a teacher."""
    if teacher is not None and student is not None and student.vocab_size < teacher.vocab_size:
        yield (
            f"{key}: its teacher has a vocabulary of {teacher.vocab_size:,}, the student one of "
            f"{student.vocab_size:,}. Allowed: at most the student's. Next: set inputs.cache: null."
        )


def _load(name: str, params: DistillStage, layout: Parallel, view: RecipeView) -> Load | None:
    return distillation_load(
        view.shape(params.inputs.student),
        view.shape(params.inputs.teacher),
        params,
        params.num_steps,
        layout,
        cached=params.inputs.cache is not None,
        teacher_learns=params.teacher_correction is not None,
    )


DISTILL = StageKind(
    name="distill",
    params=DistillStage,
    run="nemo_minitron.stages.distill.run:distill",
    version=3,
    outputs=(Output.MODEL,),
    inputs={
        "student": (Output.MODEL,),
        "teacher": (Output.MODEL,),
        "data": (Output.TOKENIZED_TEXT,),
        "check": (Output.TEACHER_CHECK,),
        "cache": (Output.TEACHER_CACHE,),
        "plan": (Output.PRUNE_PLAN,),
    },
    distributed=True,
    trains=True,
    stops_by_itself=True,
    resumes_with_other_rates=True,
    report="distillation",
    chat_rank=3,
    shape=_shape,
    problems=_problems,
    text_use=training_text,
    heldout_uses=validation_text,
    load=_load,
    result_tokens=trained_tokens,
)
