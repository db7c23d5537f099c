"""Training through an alignment backend, and publishing the result as a stage's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import (
    LossPoint,
    Objective,
    TaskContext,
    Training,
    alignment_backend,
)
from nemo_minitron.errors import ConfigError
from nemo_minitron.hf.checkpoint import model_facts
from nemo_minitron.schema.alignment import RowTraining
from nemo_minitron.schema.chats import TemplateName
from nemo_minitron.stages.common.alignment_rows import Rows
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result


def task_context(ctx: StageContext) -> TaskContext:
    """Return where and how the backend works for a stage."""
    execution = ctx.execution
    return TaskContext(
        stage=ctx.name,
        work_dir=ctx.work_dir,
        layout=execution.parallel_by_stage.get(ctx.name, execution.parallel),
        device=execution.device,
        threads=execution.threads,
        progress=ctx.progress,
        stop=ctx.stop,
    )


def train_and_publish(
    params: RowTraining,
    objective: Objective,
    model_dir: Path,
    rows: Rows,
    ctx: StageContext,
    *,
    template: TemplateName,
) -> Result:
    """Train, and publish a Hugging Face model with its template and curves."""
    from nemo_minitron.data.chat.published import publish_template

    facts = train(params, objective, model_dir, rows, ctx)
    publish_template(ctx.out_dir, template)
    return {**model_facts(ctx.out_dir), **facts}


def train(params: RowTraining, objective: Objective, model_dir: Path, rows: Rows, ctx: StageContext) -> dict[str, Any]:
    """Train into the stage's output folder; returns the facts of the training for the manifest.

    Raises:
        ConfigError: the warmup is as long as the training, or a key or model that the backend does not support.
    """
    num_steps = params.num_steps or params.num_epochs * (rows.num_train // params.global_batch_size)
    if params.warmup_steps >= num_steps:
        raise ConfigError(
            f"{params.warmup_steps} steps of warmup, and the training has {num_steps}: {rows.num_train} rows, "
            f"{params.global_batch_size} in a batch, num_epochs = {params.num_epochs}.",
            where=f"stages.{ctx.name}.warmup_steps",
            allowed=f"at most {num_steps - 1}",
            next_step="Lower it, or train longer.",
        )
    training = Training(
        model_dir=model_dir,
        objective=objective,
        train_rows=rows.train,
        valid_rows=rows.valid,
        num_train_rows=rows.num_train,
        num_steps=num_steps,
        global_batch_size=params.global_batch_size,
        max_seq_len_tokens=params.max_seq_len_tokens,
        lr=params.lr,
        min_lr=params.min_lr,
        warmup_steps=params.warmup_steps,
        valid_interval_steps=params.valid_interval_steps,
        seed=params.seed,
        overrides=params.aligner,
    )
    curve = alignment_backend().train(training, ctx.out_dir, task_context(ctx))
    return {"method": objective.method, **_curve_facts(curve), "lengths": rows.facts}


def _curve_facts(curve: list[LossPoint]) -> dict[str, Any]:
    train_losses = [point.train for point in curve if point.train is not None]
    valid = [point for point in curve if point.valid is not None]
    return {
        "num_steps": curve[-1].step,
        "first_loss": train_losses[0],
        "last_loss": train_losses[-1],
        "first_valid_loss": valid[0].valid if valid else None,
        "first_valid_loss_se": valid[0].valid_se if valid else None,
        "valid_loss": valid[-1].valid if valid else None,
        "valid_loss_se": valid[-1].valid_se if valid else None,
    }
