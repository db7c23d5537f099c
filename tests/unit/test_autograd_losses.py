"""A loss written as a plain function equals the closed form, gradient included, in fp64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nemo_minitron.distillation.autograd import LogitLoss, autograd_loss, log_softmax, split_autograd_loss
from nemo_minitron.distillation.linear import Head, linear_loss
from nemo_minitron.distillation.losses import forward_kl
from nemo_minitron.distillation.objective import live_teacher
from nemo_minitron.distillation.vocab import WHOLE, Vocab
from nemo_minitron.errors import PlanError
from nemo_minitron.schema.losses import LogitsLoss

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def split_kl(student: Tensor, teacher: Tensor, vocab: Vocab) -> Tensor:
    log_q, log_p = log_softmax(student, vocab), log_softmax(teacher, vocab)
    return vocab.sum((log_p.exp() * (log_p - log_q)).sum(-1))


def _normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("loss", [autograd_loss(plain_kl), split_autograd_loss(split_kl)], ids=["whole", "split"])
def test_forward_kl_and_its_gradient_equal_the_closed_form(loss: LogitLoss, temperature: float) -> None:
    student, teacher, params = _normal(15, 17, seed=0), _normal(15, 17, seed=1), LogitsLoss(temperature=temperature)
    found = loss(student.clone(), teacher.clone(), params)
    torch.testing.assert_close(found, forward_kl(student.clone(), teacher.clone(), params), **EXACT)


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
def test_head_and_loss_together_equal_the_closed_form(chunk_tokens: int | None) -> None:
    hidden, weight = _normal(20, 8, seed=0).requires_grad_(), (_normal(31, 8, seed=1) / 9).requires_grad_()
    teacher_hidden, teacher_weight, tokens = _normal(20, 6, seed=2), _normal(31, 6, seed=3) / 9, _normal(20, seed=4)
    loss, head = autograd_loss(plain_kl), Head(teacher_weight, teacher_hidden, chunk_tokens=chunk_tokens)

    def prototype(student: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return loss(student, head.logits(rows), LogitsLoss())

    closed = live_teacher(teacher_hidden, teacher_weight, LogitsLoss(), chunk_tokens=chunk_tokens)
    values, gradients = [], []
    for chunk_loss in (prototype, closed):
        values.append(linear_loss(hidden, weight, tokens, chunk_loss, chunk_tokens=chunk_tokens))
        gradients.append(torch.autograd.grad(values[-1], (hidden, weight)))
    torch.testing.assert_close(*values, **EXACT)
    torch.testing.assert_close(*gradients, **EXACT)


class _Ranks:
    """Reductions between the threads of this process, one thread for each rank."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.given = size, threading.Barrier(size), [torch.empty(0)] * size

    def vocab(self, rank: int, columns: int) -> Vocab:
        def reduce(combine: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def apply(tensor: Tensor) -> Tensor:
                self.given[rank] = tensor
                self.barrier.wait(10)
                found = combine(torch.stack(self.given))
                self.barrier.wait(10)
                return found

            return apply

        return Vocab(start=rank * columns, max=reduce(lambda x: x.amax(0)), sum=reduce(lambda x: x.sum(0)))


def test_a_split_vocabulary_gives_the_gradient_of_each_part() -> None:
    student, teacher, params, ranks = _normal(15, 18, seed=0), _normal(15, 18, seed=1), LogitsLoss(), _Ranks(3)
    loss, parts = split_autograd_loss(split_kl), [slice(0, 6), slice(6, 12), slice(12, 18)]

    def on_rank(rank: int) -> tuple[Tensor, Tensor]:
        part = parts[rank]
        return loss(student[:, part].clone(), teacher[:, part].clone(), params, ranks.vocab(rank, 6))

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(on_rank, range(3)))
    expected, gradient = forward_kl(student.clone(), teacher.clone(), params)
    for values, _ in found:
        torch.testing.assert_close(values, expected, **EXACT)
    torch.testing.assert_close(torch.cat([part for _, part in found], -1), gradient, **EXACT)


def test_a_loss_of_whole_rows_refuses_a_split_vocabulary() -> None:
    with pytest.raises(PlanError, match="plain_kl needs whole vocabulary rows") as error:
        autograd_loss(plain_kl)(_normal(2, 3, seed=0), _normal(2, 3, seed=1), LogitsLoss(), Vocab(start=3))
    assert error.value.allowed == "tp = 1"
    assert autograd_loss(plain_kl)(_normal(2, 3, seed=0), _normal(2, 3, seed=1), LogitsLoss(), Vocab())


def test_a_loss_must_return_one_value_per_token() -> None:
    with pytest.raises(ValueError, match=r"has shape \[\], not one value per token: \[2\]"):
        autograd_loss(lambda s, t: (s - t).square().sum())(
            _normal(2, 3, seed=0), _normal(2, 3, seed=1), LogitsLoss(), WHOLE
        )


def test_the_gradient_may_be_scaled_in_place() -> None:
    """Autograd may return an expanded tensor, which cannot be modified in place."""
    _, grad = autograd_loss(lambda s, t: (s - t).sum(-1))(_normal(2, 3, seed=0), _normal(2, 3, seed=1), LogitsLoss())
    grad.mul_(2.0)
    torch.testing.assert_close(grad, torch.full((2, 3), 2.0, dtype=torch.float64))
