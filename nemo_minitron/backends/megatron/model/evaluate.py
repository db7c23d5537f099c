"""Held-out loss of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.data.datasets import HeldOutBatches, heldout_batches
from nemo_minitron.backends.megatron.model.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.model.head import head_weight, model_hidden, vocab_of_model
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.distillation.linear import Head
from nemo_minitron.distillation.losses import next_token
from nemo_minitron.system.progress import Progress
from nemo_minitron.workload.heldout import heldout_batch_size


@dataclass(frozen=True)
class HeldOut:
    """Sums over held-out text."""

    nll_nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nll_nats / self.num_tokens


def heldout_loss(
    model_dir: Path,
    data_dir: Path,
    *,
    num_tokens: int,
    seq_len_tokens: int,
    precision: str,
    session: Session,
    progress: Progress,
) -> HeldOut:
    """Compute the next-token loss of a checkpoint on the validation split; equal on every rank."""
    model, shape = load_model(model_dir, session, precision=precision, seq_len_tokens=seq_len_tokens)
    heldout = heldout_batches(
        data_dir,
        session,
        num_tokens=num_tokens,
        seq_len_tokens=seq_len_tokens,
        batch_size=heldout_batch_size(seq_len_tokens),
    )
    return sum_nll(model, heldout, shape.vocab_size, session, progress)


def sum_nll(model: Model, heldout: HeldOutBatches, vocab_size: int, session: Session, progress: Progress) -> HeldOut:
    """Compute the loss of a model that is already in memory; logits exist a chunk at a time."""
    totals = torch.zeros(2, dtype=torch.float64, device=session.device)
    vocab = vocab_of_model(session, vocab_size)

    def add(hidden_BSD: Tensor, batch: Batch) -> None:
        labels, mask = batch["labels"].flatten(), batch["loss_mask"].flatten()
        output = Head(head_weight(model, vocab_size), hidden_BSD.flatten(0, 1), vocab)
        for rows in output.all_blocks():
            nll, _ = next_token(output.logits(rows), labels[rows], vocab)
            weights = mask[rows].double()
            totals.add_(torch.stack([nll.double() @ weights, weights.sum()]))

    with evaluating(model):
        batches = progress.track(heldout.batches, "held-out loss", len(heldout.batches), "batches")
        forward_batches(model, batches, session, add, forward=model_hidden)
    _sum_over_data_parallel(totals, session)
    return HeldOut(float(totals[0]), int(totals[1]), heldout.num_bytes)


def _sum_over_data_parallel(totals: Tensor, session: Session) -> None:
    """Sum over all ranks; tensor-parallel ranks of the last stage hold equal sums, so count one of them."""
    if not (session.is_last_stage and session.tp_rank == 0):
        totals.zero_()
    session.sum(totals)
