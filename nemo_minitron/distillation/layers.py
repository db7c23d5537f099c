"""Layer-local distillation: which of the teacher's states a student's layer learns, and how far it is from them.

The stream at position p is the teacher's residual stream before its layer p; the last position is the stream after the
last layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stream_positions(kept_layers: Sequence[int], num_teacher_layers: int) -> tuple[int, ...]:
    """Return the positions between which the student's layers map the stream: layer i from the i-th to the next one.

    Each layer ends where the next kept layer of the teacher begins, so it also stands for the dropped layers in
    between. The first layer starts from the embeddings, as in the student, even if the teacher's first layer was
    dropped; the last layer ends with the teacher's last one.
    """
    return (0, *kept_layers[1:], num_teacher_layers)


def relative_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ||s - t||^2 / ||t||^2 over the last dimension, in at least fp32.

    This is the normalized error of Puzzle (2411.19146), MSE(s, t) / MSE(t, 0), but for each token alone. So the few
    tokens with massive activations (2402.17762), such as the first of a sequence, do not dominate the loss, and the
    batch may be split in any way.
    """
    errors, norms = squared_errors(student, teacher)
    return errors / norms


def squared_errors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return ||s - t||^2 and ||t||^2, positive and without gradient, over the last dimension, in at least fp32."""
    wide = torch.promote_types(student.dtype, torch.float32)
    expected = teacher.detach().to(wide)
    norms = expected.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
    return (student.to(wide) - expected).square().sum(-1), norms
