"""Forward and backward passes of a step through Megatron's schedules, in one round of micro-batches or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.runtime.versions import share_of_loss
from nemo_minitron.backends.megatron.training.optim import Trainable

Parts = dict[str, Tensor]
"""Terms of a loss, for the curves: name -> detached scalar, the same on every rank of the last stage.

With context parallelism each rank has its share, and their sum is the loss.
"""
ForwardStep = Callable[[torch.nn.Module, Batch, Any], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Parts]]]]
"""(model, micro-batch, extra from `Objective.prepare`) -> (stage output, function: output -> loss, parts)."""


@dataclass(frozen=True)
class Round:
    """A part of the micro-batches of one step. Gradients add up over the rounds of a step."""

    step: int
    num_micro_batches: int
    """Micro-batches of this round on each data-parallel rank."""
    num_micro_batches_of_step: int
    micro_batch_size: int
    seq_len_tokens: int
    is_first: bool
    is_last: bool


def accumulate(
    trainable: Trainable,
    forward: ForwardStep,
    data: Iterator[tuple[Batch, Any]],
    part: Round,
) -> list[Parts]:
    """Add the gradients of a round to those of the step's earlier rounds; return the losses per micro-batch.

    The first round replaces the gradients; the last one sums them over the ranks.

    Args:
        data: micro-batches with their extras.
    """
    if part.is_first:
        trainable.ddp.zero_grad_buffer()
        trainable.optimizer.zero_grad()
    found: list[Parts] = []
    with _sums_over_ranks(trainable, part.is_last):
        get_forward_backward_func()(
            forward_step_func=_forward_step(forward, part, found),
            data_iterator=data,
            model=[trainable.ddp],
            num_microbatches=part.num_micro_batches,
            seq_length=part.seq_len_tokens,
            micro_batch_size=part.micro_batch_size,
            forward_only=False,
        )
    return found


@contextmanager
def _sums_over_ranks(trainable: Trainable, is_last_round: bool) -> Iterator[None]:
    """Let the schedule sum gradients over the ranks in the last round only."""
    if is_last_round:
        yield
        return
    config = trainable.model.config
    functions = {name: getattr(config, name) for name in ("no_sync_func", "finalize_model_grads_func")}
    try:
        for name in functions:
            setattr(config, name, None)
        with trainable.ddp.no_sync():
            yield
    finally:
        for name, function in functions.items():
            setattr(config, name, function)


def _forward_step(forward: ForwardStep, part: Round, found: list[Parts]) -> Callable[..., Any]:
    def step(data: Iterator[tuple[Batch, Any]], model: torch.nn.Module) -> Any:
        batch, extra = next(data)
        output, loss_of = forward(model, batch, extra)

        def loss(output: Tensor) -> tuple[Tensor, Parts]:
            value, parts = loss_of(output)
            found.append({"train_loss": value.detach().clone(), **parts})
            return _share_of_step(share_of_loss(value), part), {}

        return output, loss

    return step


def _share_of_step(loss: Tensor, part: Round) -> Tensor:
    """Scale a loss so that, after Megatron has divided it by the micro-batches of the round, it is a step's share."""
    if part.num_micro_batches == part.num_micro_batches_of_step:
        return loss
    return loss * part.num_micro_batches / part.num_micro_batches_of_step
