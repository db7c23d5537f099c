"""The losses never read a value of a tensor in Python: on a GPU each such read waits for all kernels before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_minitron.distillation import fused_kl
from nemo_minitron.distillation.fused_kl import FusedForwardKl
from nemo_minitron.distillation.linear import linear_loss
from nemo_minitron.distillation.losses import LOSSES, distance, next_token
from nemo_minitron.distillation.objective import live_teacher
from nemo_minitron.distillation.sparse import sparse_distance, sparsify
from nemo_minitron.distillation.vocab import WHOLE
from nemo_minitron.schema.losses import LogitsLoss, Sampled, TopK

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
SPARSE = [TopK(kind="top_k", k=4), TopK(kind="top_k", k=4, tail="drop"), Sampled(kind="sampled", rounds=8)]


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 50, generator=generator), torch.randn(6, 50, generator=generator)


def test_a_read_is_noticed() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), _NoReads():
        bool(torch.ones(1).any())


@pytest.mark.parametrize("sparse", SPARSE, ids=lambda sparse: f"{sparse.kind}-{getattr(sparse, 'tail', '')}")
def test_sparse_losses_read_nothing(sparse: TopK | Sampled) -> None:
    student, teacher = _logits()
    uniforms = torch.rand(6, 8)
    params = LogitsLoss(sparse=sparse)
    with _NoReads():
        kept = sparsify(teacher, sparse, 1.0, uniforms, WHOLE)
        sparse_distance(student, kept, params)


@pytest.mark.parametrize("kind", LOSSES)
def test_dense_losses_read_nothing(kind: str) -> None:
    student, teacher = _logits()
    with _NoReads():
        distance(student, teacher, LogitsLoss(kind=kind))  # type: ignore[arg-type]
        next_token(_logits()[0], torch.zeros(6, dtype=torch.long))


def test_head_and_loss_together_read_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(*size, generator=generator) for size in ((6, 8), (50, 8), (6, 8)))
    tokens = torch.full((6,), 1 / 6)
    hidden.requires_grad_()
    kernels = fused_kl.kernels_of("torch", on_gpu=False)
    fused = FusedForwardKl(other, weight, tokens, LogitsLoss(), kernels)
    with _NoReads():
        linear_loss(hidden, weight, tokens, live_teacher(other, weight, LogitsLoss())).backward()
        linear_loss(hidden, weight, tokens, fused, in_place=True).backward()
