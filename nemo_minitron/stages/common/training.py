"""Megatron trainings in stages: distillation, and the facts that every training reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.distillation.words import loss_in_words
from nemo_minitron.errors import ArtifactError
from nemo_minitron.schema.training import Distillation
from nemo_minitron.stages.artifacts import Model, PrunePlanArtifact, TokenizedText
from nemo_minitron.stages.context import StageContext

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.training.curves import Curves
    from nemo_minitron.backends.megatron.training.loop import Job, LoopOptions
    from nemo_minitron.pruning.plan_file import PrunePlan


def distill_student(
    params: Distillation,
    student: Model,
    teacher: Model,
    data: TokenizedText,
    ctx: StageContext,
    *,
    cache: Path | None = None,
    keys: str | None = None,
    plan: PrunePlan | None = None,
) -> dict[str, Any]:
    """Distill a teacher into a student. After a kill, the training resumes from the work folder.

    Write the student as a Hugging Face checkpoint, curves.jsonl, data_used.json and tensorboard/.

    Args:
        cache: folder of the teacher's cached distributions; the teacher itself is then not loaded.
        keys: location of the training's keys in the recipe, for messages, if other stages are trained with them, too;
            None: the stage itself.
        plan: the plan by which the student was pruned, for a loss with anchors.

    Returns:
        Facts for the manifest; empty on all ranks but the first.

    Raises:
        DivergenceError: the loss became NaN or infinite, or stayed above its bound.
        Interrupted: a stop was requested.
    """
    from nemo_minitron.backends.megatron.distillation import distill as objectives
    from nemo_minitron.backends.megatron.training import loop as training

    session = ctx.open_session
    if cache is not None:
        job = objectives.prepare_cached(params, student.path, cache, data.path, ctx.work_dir, session)
    else:
        job = objectives.prepare(params, student.path, teacher.path, data.path, ctx.work_dir, session, plan)
    # Before the training, so that a loss without a description cannot fail after it.
    description = loss_in_words(params.loss, cached=cache is not None, corrected=params.of_teacher is not None)
    curves = training.run(job, ctx.work_dir, ctx.progress, loop_options(ctx, keys))
    model_facts = training.publish(job, student.path, ctx.work_dir, ctx.out_dir)
    facts = training_facts(job, curves, student, data)
    return {**model_facts, **facts, "loss": description} if ctx.is_main else {}


def plan_between(artifact: PrunePlanArtifact, teacher: Model, student: Model) -> PrunePlan:
    """Read a plan and check that it leads from the teacher to the student.

    Raises:
        ArtifactError: the sizes of one of the models are others.
    """
    plan = artifact.load(teacher.shape)
    left = plan.target_shape(teacher.shape).sizes()
    if left != student.shape.sizes():
        raise ArtifactError(
            f"The plan leaves {left}, but the student is {student.shape.sizes()}.",
            where=f"{artifact.path}, {student.path}",
            next_step="Name the plan by which the student was pruned.",
        )
    return plan


def loop_options(ctx: StageContext, keys: str | None = None) -> LoopOptions:
    """Return the options that the training loop takes from the run."""
    from nemo_minitron.backends.megatron.training.loop import LoopOptions

    return LoopOptions(
        execution=ctx.execution,
        recipe_name=ctx.recipe_name,
        stop=ctx.stop,
        stage=ctx.name,
        keys=keys or f"stages.{ctx.name}",
        resumes_with_other_rates=keys is None,
    )


def training_facts(job: Job, curves: Curves, model: Model, data: TokenizedText) -> dict[str, Any]:
    """Return the facts about a training for its manifest; losses are in nats per token.

    Every rank calls this; ranks other than the first get an empty mapping.
    """
    from nemo_minitron.backends.megatron.runtime.peak import peak_memory_gib

    peaks_gib = job.session.gather(peak_memory_gib(job.session.device))
    if not job.session.is_main:
        return {}
    measured = [key for key in ("valid_loss", "valid_kl", "valid_teacher_loss") if curves.has(key)]
    return {
        "license": model.license,
        "data_sources": data.sources,
        "num_steps": job.num_steps,
        "tokens": job.num_steps * job.tokens_per_step,
        "peak_memory_gib": max(peaks_gib),
        **{f"initial_{key}": curves.first(key) for key in measured},
        **{f"final_{key}": curves.last(key) for key in (*measured, "train_loss")},
    }
