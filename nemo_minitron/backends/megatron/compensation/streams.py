"""The text of a repair as residual streams: one for each micro-batch, advanced layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_minitron.backends.megatron.data.datasets import heldout_rows, training_samples
from nemo_minitron.backends.megatron.runtime.session import Session


@dataclass
class Stream:
    """One micro-batch and its residual streams in front of the current layer, on the CPU."""

    counted: Tensor
    """True for the positions that are used, [S, B]."""
    is_heldout: bool
    teacher: Tensor
    """Stream of the teacher [S, B, D]."""
    student: Tensor | None
    """Stream of the student [S, B, D']; None if only the teacher runs."""
    teacher_after: Tensor | None = None
    """The teacher's stream in front of the student's next layer, once it has been computed."""

    @property
    def of_student(self) -> Tensor:
        """The stream of a student that runs."""
        assert self.student is not None
        return self.student


@dataclass(frozen=True)
class MicroBatch:
    """Text of one micro-batch."""

    tokens: Tensor
    """Token ids [B, S]."""
    counted: Tensor
    """True for the positions that are used, [B, S]."""
    is_heldout: bool


def calibration_batches(
    data_dir: Path, session: Session, *, num_samples: int, seq_len_tokens: int, seed: int, cache_dir: Path
) -> list[MicroBatch]:
    """Return this process's share of the first `num_samples` training samples."""
    samples: Any = training_samples(
        data_dir, num_samples=num_samples, seq_len_tokens=seq_len_tokens, seed=seed, cache_dir=cache_dir
    )
    rows = [samples[number]["tokens"] for number in range(num_samples)]
    return _share([(row, torch.ones(len(row), dtype=torch.bool)) for row in rows], session, is_heldout=False)


def heldout_batches(data_dir: Path, session: Session, *, num_tokens: int, seq_len_tokens: int) -> list[MicroBatch]:
    """Return this process's share of the first held-out documents; padding is masked."""
    rows, _ = heldout_rows(data_dir, num_tokens=num_tokens, seq_len_tokens=seq_len_tokens, whole_documents=False)
    return _share([(row["tokens"], row["loss_mask"] > 0) for row in rows], session, is_heldout=True)


def _share(rows: Sequence[tuple[Tensor, Tensor]], session: Session, *, is_heldout: bool) -> list[MicroBatch]:
    """Cut rows into micro-batches, and take every world_size-th: sums over all processes do not depend on it."""
    size = session.parallel.micro_batch_size
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    mine = groups[session.rank :: session.world_size]
    return [
        MicroBatch(torch.stack([row for row, _ in group]), torch.stack([counted for _, counted in group]), is_heldout)
        for group in mine
    ]


def embedded(
    batches: Sequence[MicroBatch], teacher: Tensor, student: Tensor | None, dtype: torch.dtype
) -> list[Stream]:
    """Return the streams in front of the first layer: the embeddings of the tokens.

    Args:
        teacher: embeddings [V, D] of the teacher.
        student: embeddings [V, D'] of a student that runs, too.
    """
    return [
        Stream(
            counted=batch.counted.T,
            is_heldout=batch.is_heldout,
            teacher=F.embedding(batch.tokens.T, teacher).to(dtype),
            student=None if student is None else F.embedding(batch.tokens.T, student).to(dtype),
        )
        for batch in batches
    ]
