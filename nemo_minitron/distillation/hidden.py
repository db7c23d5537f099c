"""Losses between hidden states of a teacher and a student, and the choice of the states.

Each state is read after the norm that follows it, as in 2407.14679, section 3: the output of a layer after the first
norm of the next one (or the final norm), the embeddings after the first norm of the first layer, the input of an MLP
after the norm before it.

Shapes: S sequence, B batch, D hidden size (student and teacher may differ).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_minitron.errors import PlanError
from nemo_minitron.schema.losses import HiddenLoss


class Tap(NamedTuple):
    """A norm whose output is read."""

    layer: int
    """Layer of the norm, 0-based; the number of layers means the final norm."""
    norm: Literal["input", "mlp"]


class Pair(NamedTuple):
    """A state of the teacher, and the state of the student that is compared with it."""

    teacher: Tap
    student: Tap


def pairs_of(params: HiddenLoss, teacher_layers: int, student_layers: int) -> list[Pair]:
    """Return all pairs of norms that the loss compares.

    Raises:
        PlanError: a model does not have one of the layers, or there is no pair.
    """
    found = [Pair(Tap(0, "input"), Tap(0, "input"))] if params.embedding else []
    for number, (teacher, student) in enumerate(params.pairs):
        t = _layer(teacher, teacher_layers, f"loss.hidden.pairs.{number}: the teacher")
        s = _layer(student, student_layers, f"loss.hidden.pairs.{number}: the student")
        if "mlp_input" in params.states:
            found.append(Pair(Tap(t, "mlp"), Tap(s, "mlp")))
        if "block_output" in params.states:
            found.append(Pair(Tap(t + 1, "input"), Tap(s + 1, "input")))
    if not found:
        raise PlanError("loss.hidden compares nothing.", next_step="Set pairs or embedding, or remove hidden.")
    return found


def _layer(number: int, num_layers: int, model: str) -> int:
    layer = number + num_layers if number < 0 else number
    if not 0 <= layer < num_layers:
        raise PlanError(f"{model} has no layer {number}.", allowed=f"{-num_layers} to {num_layers - 1}")
    return layer


def state_loss(
    kind: str, student_SBD: Tensor, teacher_SBD: Tensor, token_weights_SB: Tensor, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the weighted sum over tokens of `1 - cos`, or of the mean squared difference over D, in at least fp32.

    Args:
        project: projects the student's states to the teacher's hidden size.
    """
    student = project(student_SBD)
    wide = torch.promote_types(student.dtype, torch.float32)
    return (DISTANCES[kind](student.to(wide), teacher_SBD.to(wide)) * token_weights_SB).sum()


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1)


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "mse": _mse}
"""Value of `kind` -> function of the states of both models [S, B, D] -> distance [S, B]."""
