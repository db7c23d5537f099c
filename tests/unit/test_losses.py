"""Forward KL against the plain formula."""

from __future__ import annotations

import pytest
import torch

from nemo_minitron.distillation import losses
from nemo_minitron.distillation.losses import VocabReduce, forward_kl


def _oracle(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _logits(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 128])
def test_loss_and_gradient_equal_the_formula(
    temperature: float, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk_tokens)
    teacher = _logits(3, 5, 17, seed=1)
    ours, theirs = (_logits(3, 5, 17, seed=0).requires_grad_() for _ in range(2))
    weight = _logits(3, 5, seed=2)
    found = forward_kl(ours, teacher, temperature=temperature)
    expected = _oracle(theirs, teacher, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    student = _logits(4, 11, seed=0).requires_grad_()
    loss = forward_kl(student, student.detach().clone())
    loss.sum().backward()
    assert student.grad is not None
    assert loss.abs().max() < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_bf16_logits_are_reduced_in_fp32() -> None:
    student, teacher = _logits(6, 300, seed=0).bfloat16(), _logits(6, 300, seed=1).bfloat16()
    found = forward_kl(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _oracle(student.double(), teacher.double(), 1.0), rtol=1e-5, atol=1e-5)


def test_the_gradient_cannot_be_taken_twice_by_accident() -> None:
    student = _logits(2, 5, seed=0).requires_grad_()
    loss = forward_kl(student, _logits(2, 5, seed=1)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_vocabulary_parts_combine_to_the_whole() -> None:
    """Two parts of the vocabulary, with reductions that see both: a tensor-parallel group in one process."""
    student, teacher = _logits(5, 8, seed=0), _logits(5, 8, seed=1)
    sums, maxima = [], []

    def record(values: list[torch.Tensor]) -> object:
        return lambda tensor: values.append(tensor.clone()) or tensor

    for part in (slice(0, 4), slice(4, 8)):
        forward_kl(student[:, part], teacher[:, part], reduce=VocabReduce(max=record(maxima), sum=record(sums)))
    # student max, teacher max of each part: the reduction is asked for each exactly once.
    assert len(maxima) == 4
    torch.testing.assert_close(torch.maximum(maxima[0], maxima[2])[:, 0], student.max(-1).values)
