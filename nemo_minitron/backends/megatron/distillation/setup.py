"""Models, loss and text of one training, and the teacher's targets for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.data.datasets import HeldOutBatches
from nemo_minitron.backends.megatron.distillation.anchors import (
    Anchors,
    Outputs,
    recording_anchors,
    transfer_anchors,
)
from nemo_minitron.backends.megatron.distillation.correction import Correction
from nemo_minitron.backends.megatron.distillation.hidden import HiddenStates, States, recording_states, transfer_states
from nemo_minitron.backends.megatron.distillation.teacher_targets import TeacherTargets
from nemo_minitron.backends.megatron.model.forward import Batch, forward_batches
from nemo_minitron.backends.megatron.model.head import model_hidden, vocab_of
from nemo_minitron.backends.megatron.model.parts import Model, head
from nemo_minitron.backends.megatron.runtime.context import own_rows
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.distillation.cache import TeacherCache
from nemo_minitron.distillation.sparse import SparseTeacher
from nemo_minitron.distillation.vocab import Vocab
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.losses import Loss


@dataclass(frozen=True)
class DistillSetup:
    """Models, loss and held-out text of one training."""

    loss: Loss
    student: Model
    teacher: Model | None
    vocab_size: int
    """Number of tokens in both vocabularies."""
    heldout: HeldOutBatches
    session: Session
    seed: int
    hidden: HiddenStates | None = None
    anchors: Anchors | None = None
    cache: TeacherCache | None = None
    teacher_loss: float | None = None
    """Held-out loss from the cache; None if it was measured on other text."""
    teacher_shape: ModelShape | None = None
    correction: Correction | None = None
    """Set if the teacher is trained, too."""

    @property
    def vocab(self) -> Vocab:
        rows = head(self.student).output_size_per_partition if self.session.is_last_stage else 0
        return vocab_of(self.session, rows, self.vocab_size)


def teacher_targets(
    setup: DistillSetup, batches: Iterable[Batch], anchor_weight: float = 0.0
) -> Iterator[TeacherTargets]:
    """Yield the teacher's targets of each micro-batch.

    Without pipeline parallelism they are computed lazily, one micro-batch at a time. With it, the teacher first runs
    its own forward schedule over all these micro-batches.

    Args:
        anchor_weight: 0: the targets have no anchors.
    """
    if not anchor_weight:
        setup = replace(setup, anchors=None)
    if setup.cache is not None:
        return _cached_targets(setup, setup.cache, batches)
    if setup.teacher is None:
        return (TeacherTargets() for _ in batches)
    if setup.session.parallel.pp == 1:
        return _live_targets(setup, setup.teacher, batches, anchor_weight)
    return iter(_pipelined_targets(setup, setup.teacher, list(batches), anchor_weight))


def _cached_targets(setup: DistillSetup, cache: TeacherCache, batches: Iterable[Batch]) -> Iterator[TeacherTargets]:
    for batch in batches:
        numbers = _cached_numbers(setup, cache, batch)
        if numbers is None or not setup.session.is_last_stage:
            yield TeacherTargets()
            continue
        whole = batch["sample_tokens"]
        found = cache.read(numbers.tolist(), whole.cpu().numpy())
        yield TeacherTargets(cached=_own_tokens(found, len(whole), setup.session).to(whole.device))


def _own_tokens(teacher: SparseTeacher, batch_size: int, session: Session) -> SparseTeacher:
    return teacher.map(lambda tensor: own_rows(tensor, batch_size, session))


def _cached_numbers(setup: DistillSetup, cache: TeacherCache, batch: Batch) -> Tensor | None:
    """Return the numbers of a batch in the cache; None if the cache does not contain it."""
    if "sample_ids" in batch:
        return batch["sample_ids"]
    return batch["window_ids"] + cache.facts.first_heldout if caches_heldout(setup) else None


def caches_heldout(setup: DistillSetup) -> bool:
    """Return whether the cache contains the teacher's distributions for the held-out text."""
    return setup.cache is not None and setup.teacher_loss is not None and setup.cache.facts.num_heldout > 0


def _live_targets(
    setup: DistillSetup, teacher: Model, batches: Iterable[Batch], anchor_weight: float
) -> Iterator[TeacherTargets]:
    taps = setup.hidden.teacher_taps if setup.hidden is not None else ()
    for batch in batches:
        with (
            torch.no_grad(),
            recording_states(teacher, taps) as states,
            recording_anchors(teacher, setup.anchors) as anchors,
        ):
            head_input = model_hidden(teacher, batch)
        yield TeacherTargets(head_input, states, anchors, anchor_weight)


def _pipelined_targets(
    setup: DistillSetup, teacher: Model, batches: list[Batch], anchor_weight: float
) -> list[TeacherTargets]:
    outputs: list[Tensor | None] = []
    kept: list[States] = []
    kept_anchors: list[Outputs] = []
    taps = setup.hidden.teacher_taps if setup.hidden is not None else ()
    with recording_states(teacher, taps) as states, recording_anchors(teacher, setup.anchors) as anchors:

        def after() -> None:
            kept.append(dict(states))
            kept_anchors.append(dict(anchors))

        def keep(hidden: Tensor, _: Batch) -> None:
            outputs.append(hidden)

        forward_batches(teacher, batches, setup.session, keep, after=after, forward=model_hidden)
    dtype = teacher.config.params_dtype
    if setup.hidden is not None:
        kept = transfer_states(kept, setup.hidden, batches, dtype)
    if setup.anchors is not None:
        kept_anchors = transfer_anchors(kept_anchors, setup.anchors, batches, dtype)
    if not setup.session.is_last_stage:
        outputs = [None] * len(batches)
    return [TeacherTargets(*found, anchor_weight) for found in zip(outputs, kept, kept_anchors, strict=True)]
