"""Rules of the stages that align a model, rate answers, or measure what came of it."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.backends.alignment.nemo_aligner.config import Method, override_problems
from nemo_minitron.backends.alignment.nemo_aligner.model_config import unknown_to_nemo
from nemo_minitron.config.schema import (
    Alignment,
    AnnotateStage,
    AttributeModelStage,
    ChatDataStage,
    DistillOfflineStage,
    DpoStage,
    EvaluateChatStage,
    Parallel,
    Recipe,
    Schema,
    SteerlmSftStage,
)
from nemo_minitron.families import ModelShape
from nemo_minitron.plan.planner import parallel_of
from nemo_minitron.plan.shapes import model_shape


def alignment_problems(name: str, stage: Schema, recipe: Recipe) -> Iterator[str]:
    """What is wrong with one stage, one line each; nothing for stages of other kinds."""
    if isinstance(stage, Alignment):
        yield from _training(name, stage, recipe)
    elif isinstance(stage, EvaluateChatStage):
        yield from _evaluation(name, stage, recipe)
    elif isinstance(stage, AnnotateStage):
        yield from _annotation(name, stage, recipe)


def _training(name: str, stage: Alignment, recipe: Recipe) -> Iterator[str]:
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


def _evaluation(name: str, stage: EvaluateChatStage, recipe: Recipe) -> Iterator[str]:
    """What an evaluation of chats asks for and cannot get."""
    key, chats = f"stages.{name}", stage.inputs.chats
    held = _chat_source(recipe, chats)
    if held is not None and held.valid_rows == 0:
        yield f"{key}.inputs.chats: stage {chats} has valid_rows = 0, and the evaluation needs held-out rows."
    if held is not None and held.rows == "pairs":
        if stage.num_generated:
            yield f"{key}.num_generated = {stage.num_generated}: needs conversations, and stage {chats} has pairs."
    elif stage.inputs.reference is not None and held is not None:
        yield f"{key}.inputs.reference: compares preferences, and stage {chats} has conversations; leave it out."
    if stage.vary_attribute is not None and not stage.num_generated:
        yield f"{key}.vary_attribute = {stage.vary_attribute}: is asked of generated answers; set num_generated."
    yield from _stricter_than_training(key, stage, recipe)


def _stricter_than_training(key: str, stage: EvaluateChatStage, recipe: Recipe) -> Iterator[str]:
    """Bad rows that a training leaves out must not stop the evaluation that comes after it."""
    for name, trained in _trainings_before(stage.inputs.model, recipe):
        same = trained.inputs.chats == stage.inputs.chats  # type: ignore[attr-defined]
        if same and trained.max_bad_fraction > stage.max_bad_fraction:
            yield (
                f"{key}.max_bad_fraction = {stage.max_bad_fraction:g}: stage {name} leaves out up to "
                f"{trained.max_bad_fraction:g} of the rows of {stage.inputs.chats}; the evaluation would stop at them. "
                f"Next: {key}.max_bad_fraction={trained.max_bad_fraction:g}."
            )


def _trainings_before(model: str, recipe: Recipe) -> Iterator[tuple[str, Alignment]]:
    """The alignments that a model has come through, the last one first."""
    seen: set[str] = set()
    while model in recipe.stages and model not in seen:
        seen.add(model)
        stage = recipe.stages[model]
        if isinstance(stage, Alignment):
            yield model, stage
        inputs = getattr(stage, "inputs", None)
        model = getattr(inputs, "model", None) or getattr(inputs, "student", None) or ""


def _annotation(name: str, stage: AnnotateStage, recipe: Recipe) -> Iterator[str]:
    held = _chat_source(recipe, stage.inputs.chats)
    if held is not None and held.rows == "pairs":
        yield f"stages.{name}.inputs.chats: stage {stage.inputs.chats} has pairs, and annotate needs conversations."
    model = recipe.stages.get(stage.inputs.attribute_model)
    if isinstance(model, AttributeModelStage) and model.reward != "regression":
        used = f"stage {stage.inputs.attribute_model} has reward = {model.reward}"
        yield f"stages.{name}.inputs.attribute_model: {used}, and annotate needs regression."


def _chat_source(recipe: Recipe, name: str) -> ChatDataStage | None:
    """The chat_data stage whose rows a stage holds."""
    stage = recipe.stages.get(name)
    if isinstance(stage, AnnotateStage):
        stage = recipe.stages.get(stage.inputs.chats)
    return stage if isinstance(stage, ChatDataStage) else None
