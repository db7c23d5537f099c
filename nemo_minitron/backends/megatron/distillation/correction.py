"""Teacher correction during distillation: the teacher is trained on the same text (2408.11796)."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.distillation.hidden import HiddenStates, States, recording_states, transfer_states
from nemo_minitron.backends.megatron.distillation.teacher_targets import TeacherTargets
from nemo_minitron.backends.megatron.model.forward import Batch
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.training.loop import mean_over_ranks, update
from nemo_minitron.backends.megatron.training.optim import Trainable
from nemo_minitron.backends.megatron.training.schedule import ForwardStep, Parts, Round, accumulate


class Correction:
    """Trains the teacher; one forward pass of it serves its own loss and the student's.

    Each round of a step calls `teacher_targets`, then runs the student; the step then calls `finish`. The teacher is
    updated last, because the student's loss uses the output layer that belongs to the targets.

    Args:
        forward: the teacher's own objective, which needs only the micro-batch.
        hidden: the pairs of hidden states that the student's loss compares.
    """

    def __init__(
        self,
        trainable: Trainable,
        forward: ForwardStep,
        hidden: HiddenStates | None,
        session: Session,
    ) -> None:
        self.trainable = trainable
        self._forward, self._hidden, self._session = forward, hidden, session
        self._losses: list[Parts] = []

    def teacher_targets(self, part: Round, batches: list[Batch]) -> list[TeacherTargets]:
        """Compute the targets of each micro-batch of a round, and add the teacher's gradients."""
        head_inputs: list[Tensor | None] = []
        kept: list[States] = []
        taps = self._hidden.teacher_taps if self._hidden is not None else ()

        def forward(model: torch.nn.Module, batch: Batch, _: Any) -> Any:
            with recording_states(model, taps) as states:
                output, loss_of = self._forward(model, batch, None)
            kept.append({tap: state.detach() for tap, state in states.items()})

            def loss(hidden_BSD: Tensor) -> tuple[Tensor, Parts]:
                head_inputs.append(hidden_BSD.detach())
                return loss_of(hidden_BSD)

            return output, loss

        losses = accumulate(self.trainable, forward, zip(batches, repeat(None), strict=False), part)
        self._losses = losses if part.is_first else self._losses + losses
        if self._hidden is not None:
            kept = transfer_states(kept, self._hidden, batches, self.trainable.model.config.params_dtype)
        if not self._session.is_last_stage:
            head_inputs = [None] * len(batches)
        return [TeacherTargets(head_input, states) for head_input, states in zip(head_inputs, kept, strict=True)]

    def finish(self) -> dict[str, float]:
        """Update the teacher; return its curve columns."""
        after = update(self.trainable)
        losses, _ = mean_over_ranks(self._losses, ("train_loss",), self._session, None)
        return {f"teacher_{name}": value for name, value in {"loss": losses["train_loss"], **after}.items()}
