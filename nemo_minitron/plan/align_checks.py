"""Rules of the stages that NeMo-Aligner runs."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.backends.aligner.config import Method, override_problems
from nemo_minitron.backends.aligner.model_config import unknown_to_nemo
from nemo_minitron.config.schema import (
    Alignment,
    AnnotateStage,
    AttributeModelStage,
    ChatDataStage,
    DistillOfflineStage,
    DpoStage,
    Parallel,
    Recipe,
    SteerlmSftStage,
)
from nemo_minitron.families import ModelShape
from nemo_minitron.plan.planner import parallel_of
from nemo_minitron.plan.shapes import model_shape


def alignment_problems(name: str, stage: Alignment, recipe: Recipe) -> Iterator[str]:
    """What is wrong with one stage, one line each."""
    key, layout = f"stages.{name}", parallel_of(recipe, name)
    yield from (f"{key}.aligner.{problem}" for problem in override_problems(method_of(stage), stage.aligner))
    yield from _data(key, stage, recipe)
    yield from _sizes(key, stage, layout)
    shape = model_shape(recipe, stage.inputs.model)  # type: ignore[attr-defined]
    if isinstance(stage, DistillOfflineStage):
        yield from _teacher(key, stage, shape, recipe, layout)
    if shape is not None:
        yield from _model(key, shape, layout)


def _model(key: str, shape: ModelShape, layout: Parallel) -> Iterator[str]:
    reason = unknown_to_nemo(shape)
    if reason is not None:
        yield f"{key}: NeMo 2.1, which NeMo-Aligner builds on, has no models with {reason}."
    if shape.num_layers % layout.pp:
        yield f"{key}: NeMo needs as many layers in every pipeline stage; {shape.num_layers} layers, pp = {layout.pp}."


def method_of(stage: Alignment) -> Method:
    """Which of NeMo-Aligner's trainings a stage is."""
    if isinstance(stage, DpoStage):
        return "dpo"
    if isinstance(stage, DistillOfflineStage):
        return "knowledge_distillation"
    return "reward_model" if isinstance(stage, AttributeModelStage) else "sft"


def _teacher(
    key: str, stage: DistillOfflineStage, student: ModelShape | None, recipe: Recipe, layout: Parallel
) -> Iterator[str]:
    if not (stage.kd_loss_weight or stage.sft_loss_weight):
        yield f"{key}: kd_loss_weight and sft_loss_weight are both 0."
    teacher = model_shape(recipe, stage.inputs.teacher)
    if teacher is None:
        return
    yield from _model(f"{key}.inputs.teacher", teacher, layout)
    if stage.top_k > teacher.vocab_size:
        yield f"{key}.top_k = {stage.top_k}: the teacher's vocabulary has {teacher.vocab_size} tokens."
    if teacher.vocab_size % layout.tp:
        yield f"{key}: tp = {layout.tp}: must divide the vocabulary, {teacher.vocab_size}; top_k would hold padding."
    if student is not None and student.vocab_size != teacher.vocab_size:
        yield f"{key}: the student's vocabulary has {student.vocab_size} tokens, the teacher's {teacher.vocab_size}."


def _data(key: str, stage: Alignment, recipe: Recipe) -> Iterator[str]:
    source = recipe.stages.get(stage.inputs.chats)  # type: ignore[attr-defined]
    pairs = isinstance(stage, DpoStage) or (isinstance(stage, AttributeModelStage) and stage.reward == "ranking")
    needed = "pairs" if pairs else "conversations"
    if isinstance(source, ChatDataStage):
        if source.rows != needed:
            yield f"{key}.inputs.chats: stage {stage.inputs.chats} has rows: {source.rows}, not {needed}."  # type: ignore[attr-defined]
        if source.valid_rows < stage.global_batch_size:
            yield (
                f"{key}.global_batch_size = {stage.global_batch_size}: validation takes whole batches, and stage "
                f"{stage.inputs.chats} has valid_rows = {source.valid_rows}."  # type: ignore[attr-defined]
            )
    elif isinstance(source, AnnotateStage) and pairs:
        yield f"{key}.inputs.chats: an annotate stage has conversations, not pairs."
    if isinstance(stage, SteerlmSftStage) and not stage.condition_on_attributes:
        yield f"{key}.condition_on_attributes = false: then it is an ordinary sft stage."


def _sizes(key: str, stage: Alignment, layout: Parallel) -> Iterator[str]:
    unit = layout.micro_batch_size * layout.dp
    if stage.global_batch_size % unit:
        yield (
            f"{key}.global_batch_size = {stage.global_batch_size}: not a multiple of micro_batch_size * dp = "
            f"{layout.micro_batch_size} * {layout.dp}."
        )
    if stage.min_lr > stage.lr:
        yield f"{key}.min_lr = {stage.min_lr}: above lr = {stage.lr}."
    if stage.num_steps is not None and stage.warmup_steps >= stage.num_steps:
        yield f"{key}.warmup_steps = {stage.warmup_steps}: must be fewer than num_steps = {stage.num_steps}."
