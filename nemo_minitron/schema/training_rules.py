"""Rules for the keys of a training. Each function yields one line for each rule that is broken."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import LearningRate, Optimization

MAX_SAMPLES = 2**32
"""Maximum number of samples; their index in memory takes about 50 GB."""


def training_problems(
    name: str, stage: Optimization, num_steps: int, layout: Parallel, steps_key: str | None = None
) -> Iterator[str]:
    """Check the batch size, number of steps, learning rate and layout of a training.

    Args:
        name: name of the stage.
        steps_key: full key of the number of steps, for a training whose other keys are in `retraining`.
    """
    key, size = f"stages.{name}", layout.dp * layout.micro_batch_size
    if steps_key is not None:
        key += ".retraining"
    if stage.global_batch_size % size:
        yield (
            f"{key}.global_batch_size = {stage.global_batch_size}: must be a multiple of "
            f"dp * micro_batch_size = {layout.dp} * {layout.micro_batch_size} = {size}."
        )
    product = f"{steps_key or key + '.num_steps'} * global_batch_size"
    yield from sample_count_problems(product, num_steps * stage.global_batch_size)
    yield from learning_rate_problems(key, stage, num_steps, steps_key or "num_steps")
    yield from _options(key, stage, layout)
    if layout.sequence_parallel and stage.seq_len_tokens % layout.tp:
        yield f"{key}.seq_len_tokens = {stage.seq_len_tokens}: must be a multiple of tp = {layout.tp}."


def sample_count_problems(what: str, count: int) -> Iterator[str]:
    """Check that the index of the samples, which is kept in memory, can hold this number of samples."""
    if count > MAX_SAMPLES:
        yield f"{what} = {count:,} samples: more than the index of samples can hold. Allowed: up to {MAX_SAMPLES:,}."


def learning_rate_problems(key: str, rate: LearningRate, num_steps: int, steps_key: str) -> Iterator[str]:
    """Check a learning-rate schedule for this number of steps."""
    if rate.min_lr > rate.lr:
        yield f"{key}.min_lr = {rate.min_lr}: above lr = {rate.lr}."
    if rate.warmup_steps >= num_steps:
        yield f"{key}.warmup_steps = {rate.warmup_steps}: must be below {steps_key} = {num_steps}."
    # The last step of every other schedule has min_lr.
    if num_steps == 1 and rate.lr_schedule != "constant" and rate.min_lr < rate.lr:
        yield (
            f"{key}.lr = {rate.lr}: never used, because the only step has min_lr = {rate.min_lr}. "
            f"Next: set {steps_key} to 2 or more, or lr_schedule: constant."
        )
    most = num_steps - rate.warmup_steps
    if rate.lr_schedule == "wsd" and not 0 < (rate.wsd_decay_steps or 0) <= most:
        yield f"{key}.wsd_decay_steps = {rate.wsd_decay_steps}: lr_schedule = wsd needs 1 to {most}."
    if rate.lr_schedule != "wsd" and rate.wsd_decay_steps is not None:
        yield f"{key}.wsd_decay_steps = {rate.wsd_decay_steps}: read by lr_schedule = wsd only. Next: set both or none."


def _options(key: str, stage: Optimization, layout: Parallel) -> Iterator[str]:
    """Check options of a layout that exclude or require each other."""
    of_run = "execution.parallel"
    if layout.overlap_param_gather and not (layout.distributed_optimizer and layout.overlap_grad_reduce):
        yield f"{of_run}.overlap_param_gather: needs {of_run}.distributed_optimizer and {of_run}.overlap_grad_reduce."
    loss = getattr(stage, "loss", None)
    for term in ("hidden", "anchors"):
        if layout.recompute == "full" and getattr(loss, term, None) is not None:
            yield f"{of_run}.recompute = full: not supported with {key}.loss.{term}. Allowed: none, selective."
    if loss is None or loss.hidden is None:
        return
    if layout.pp > 1 and layout.overlap_grad_reduce:
        yield f"{of_run}.overlap_grad_reduce: not supported with pp > 1 and {key}.loss.hidden."
