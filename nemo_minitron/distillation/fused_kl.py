"""Forward KL and its gradient in two passes over the logits, which stay in the precision of the matrix product.

The closed form in losses.py reads and writes about 130 bytes for each pair of bf16 logits; here it is 10: both passes
read both logits, and the second overwrites the student's with the gradient. Each pass is one kernel: a Triton kernel
(triton_kl.py), or one that torch.compile makes of the functions here.

Shapes: n tokens of a chunk, V this rank's part of the vocabulary. Source: 2407.14679, section 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from nemo_minitron.distillation.linear import Head
from nemo_minitron.distillation.losses import LossAndGrad
from nemo_minitron.distillation.vocab import WHOLE, Vocab
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.schema.losses import LogitsLoss, Loss

MAX_S, SUM_S, MAX_T, SUM_T, DOT = range(5)
"""Rows of the statistics: maximum and sum of exp(logit - maximum) of student and teacher, and
sum exp(t - max_t) ((t - max_t) - (s - max_s)), of logits divided by the temperature."""


@dataclass(frozen=True)
class KlKernels:
    """The two passes over the logits of a chunk."""

    statistics: Callable[[Tensor, Tensor, float], Tensor]
    """(student [n, V], teacher [n, V], temperature) -> statistics [5, n] of this part of the vocabulary."""
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor, float], None]
    """(student [n, V], teacher [n, V], statistics [5, n] of the whole vocabulary, weights [n], temperature): overwrite
    the student's logits with weight (p_s - p_t)."""


def statistics(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute the statistics of both distributions [5, n] in at least fp32."""
    s, t = _wide(student, temperature), _wide(teacher, temperature)
    max_s, max_t = s.amax(-1), t.amax(-1)
    s, t = s - max_s[:, None], t - max_t[:, None]
    exp_t = t.exp()
    return torch.stack([max_s, s.exp().sum(-1), max_t, exp_t.sum(-1), (exp_t * (t - s)).sum(-1)])


def gradient_(student: Tensor, teacher: Tensor, found: Tensor, weights: Tensor, temperature: float) -> None:
    """Overwrite the student's logits with weight (p_s - p_t)."""
    s, t = _wide(student, temperature), _wide(teacher, temperature)
    p_s = (s - found[MAX_S][:, None]).exp() / found[SUM_S][:, None]
    p_t = (t - found[MAX_T][:, None]).exp() / found[SUM_T][:, None]
    student.copy_((p_s - p_t) * weights[:, None])


def _wide(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def whole_statistics(found: Tensor, vocab: Vocab) -> Tensor:
    """Combine the statistics of the ranks that share the vocabulary."""
    if vocab == WHOLE:
        return found
    max_s, max_t = vocab.max(torch.stack([found[MAX_S], found[MAX_T]])).unbind()
    down_s, down_t = found[MAX_S] - max_s, found[MAX_T] - max_t
    dot = down_t.exp() * (found[DOT] + found[SUM_T] * (down_t - down_s))
    sums = torch.stack([down_s.exp() * found[SUM_S], down_t.exp() * found[SUM_T], dot])
    sum_s, sum_t, dot = vocab.sum(sums).unbind()
    return torch.stack([max_s, sum_s, max_t, sum_t, dot])


def kl_of(found: Tensor) -> Tensor:
    """Compute `sum_v p_t (log p_t - log p_s)` [n] from the statistics of the whole vocabulary, nats."""
    return found[DOT] / found[SUM_T] - found[SUM_T].log() + found[SUM_S].log()


@cache
def kernels_of(name: str, *, on_gpu: bool) -> KlKernels:
    """Return the kernels for a value of execution.kernels.fused_kl other than auto and off."""
    if name == "triton":
        from nemo_minitron.distillation import triton_kl

        return KlKernels(triton_kl.statistics, triton_kl.gradient_)
    if not on_gpu:
        return KlKernels(statistics, gradient_)
    return KlKernels(torch.compile(statistics), torch.compile(gradient_))


def chosen(name: str, loss: Loss, dtype: torch.dtype, *, on_gpu: bool) -> str | None:
    """Return the kernels to use for a loss, triton or torch; None if it is computed without them.

    Args:
        name: execution.kernels.fused_kl.
        dtype: precision of the logits; the Triton kernels compute in fp32.

    Raises:
        EnvironmentProblem: the kernels that `name` requests cannot run on this machine.
    """
    if name == "off" or not loss.is_lone_forward_kl:
        return None
    if name == "auto":
        return "triton" if on_gpu and dtype != torch.float64 and _can_run("triton", on_gpu=on_gpu) else None
    if not _can_run(name, on_gpu=on_gpu):
        others = [other for other in ("triton", "torch") if _can_run(other, on_gpu=on_gpu)]
        raise EnvironmentProblem(
            f"fused_kl = {name} needs {'the package triton' if on_gpu else 'a GPU'}.",
            allowed=", ".join(["auto", *others, "off"]),
            next_step="Leave it out: auto uses the kernels that this machine can run.",
        )
    return name


def _can_run(name: str, *, on_gpu: bool) -> bool:
    has_triton = find_spec("triton") is not None
    if name == "torch":
        # On a GPU, torch.compile makes Triton kernels.
        return has_triton or not on_gpu
    return has_triton and (on_gpu or os.environ.get("TRITON_INTERPRET") == "1")


class FusedForwardKl:
    """Forward KL to a teacher whose head runs on each chunk of tokens, for `linear_loss(..., in_place=True)`.

    Args:
        hidden_TD: input of the teacher's output layer; D may differ from the student's.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        token_weights_T: Tensor,
        params: LogitsLoss,
        kernels: KlKernels,
        vocab: Vocab = WHOLE,
        *,
        chunk_tokens: int | None = None,
    ) -> None:
        self._head = Head(weight_VD, hidden_TD, vocab, chunk_tokens=chunk_tokens)
        self._token_weights, self._params = token_weights_T, params
        self._kernels, self._vocab = kernels, vocab

    @torch.no_grad()
    def __call__(self, student: Tensor, rows: slice) -> LossAndGrad:
        """Return the loss [n], and the student's logits, overwritten with the gradient times the token weights."""
        temperature = self._params.temperature
        factor = temperature**2 if self._params.times_temperature_squared else 1.0
        teacher = self._head.product(rows)
        found = whole_statistics(self._kernels.statistics(student, teacher, temperature), self._vocab)
        weights = self._token_weights[rows].to(found.dtype) * (factor / temperature)
        self._kernels.gradient_(student, teacher, found, weights, temperature)
        return kl_of(found) * factor, student
