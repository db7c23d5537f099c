"""Rules that the keys of a training follow; each function yields one line for each rule that is broken."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import LearningRate, Optimization

MOST_SAMPLES = 2**32
"""An index of so many takes some 50 GB; text for it does not exist."""


def training_problems(
    name: str, stage: Optimization, num_steps: int, layout: Parallel, steps_key: str | None = None
) -> Iterator[str]:
    """What is wrong with a training's batch size, steps, learning rate and layout.

    Args:
        name: of the stage.
        steps_key: the whole key of the number of steps, for a training whose other keys are in `retraining`.
    """
    key, size = f"stages.{name}", layout.dp * layout.micro_batch_size
    if steps_key is not None:
        key += ".retraining"
    if stage.global_batch_size % size:
        yield (
            f"{key}.global_batch_size = {stage.global_batch_size}: must be a multiple of "
            f"dp * micro_batch_size = {layout.dp} * {layout.micro_batch_size} = {size}."
        )
    yield from countable(f"{steps_key or key + '.num_steps'} * global_batch_size", num_steps * stage.global_batch_size)
    yield from learning_rate_problems(key, stage, num_steps, steps_key or "num_steps")
    yield from _options(name, stage, layout)
    if layout.sequence_parallel and stage.seq_len_tokens % layout.tp:
        yield f"{key}.seq_len_tokens = {stage.seq_len_tokens}: must be a multiple of tp = {layout.tp}."


def countable(what: str, count: int) -> Iterator[str]:
    """A line if there are more samples than an index, which is kept in memory, can list."""
    if count > MOST_SAMPLES:
        yield f"{what} = {count:,} samples: more than any index of samples can hold. Allowed: up to {MOST_SAMPLES:,}."


def learning_rate_problems(key: str, rate: LearningRate, num_steps: int, steps_key: str) -> Iterator[str]:
    """What is wrong with a learning-rate schedule for this number of steps."""
    if rate.min_lr > rate.lr:
        yield f"{key}.min_lr = {rate.min_lr}: above lr = {rate.lr}."
    if rate.warmup_steps >= num_steps:
        yield f"{key}.warmup_steps = {rate.warmup_steps}: must be below {steps_key} = {num_steps}."
    most = num_steps - rate.warmup_steps
    if rate.lr_schedule == "wsd" and not 0 < (rate.wsd_decay_steps or 0) <= most:
        yield f"{key}.wsd_decay_steps = {rate.wsd_decay_steps}: lr_schedule = wsd needs 1 to {most}."


def _options(name: str, stage: Optimization, layout: Parallel) -> Iterator[str]:
    """Options of a layout that do not go together."""
    key = "execution.parallel"
    if layout.overlap_param_gather and not (layout.distributed_optimizer and layout.overlap_grad_reduce):
        yield f"{key}.overlap_param_gather: needs {key}.distributed_optimizer and {key}.overlap_grad_reduce."
    loss = getattr(stage, "loss", None)
    if loss is None or loss.hidden is None:
        return
    if layout.recompute == "full":
        yield f"{key}.recompute = full: not with stages.{name}.loss.hidden; use selective."
    if layout.pp > 1 and layout.overlap_grad_reduce:
        yield f"{key}.overlap_grad_reduce: not with pp > 1 and stages.{name}.loss.hidden."
