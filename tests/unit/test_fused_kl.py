"""The fused forward KL equals the closed form, with every implementation of its two passes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from nemo_minitron.distillation import fused_kl
from nemo_minitron.distillation.fused_kl import FusedForwardKl, KlKernels, chosen, kernels_of
from nemo_minitron.distillation.objective import live_teacher, token_loss
from nemo_minitron.distillation.vocab import Vocab
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.schema.losses import LogitsLoss, Loss

HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NAMES = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")),
]
LOSSES = {
    "plain": LogitsLoss(),
    "softened": LogitsLoss(temperature=2.5),
    "times T squared": LogitsLoss(temperature=0.5, times_temperature_squared=True),
}
TOKENS, VOCAB, HIDDEN = 23, 4100, 32


def _inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * by).to(DEVICE, dtype)

    weights = (torch.rand(TOKENS, generator=generator) / TOKENS).to(DEVICE)
    weights[3] = 0.0
    return [normal(TOKENS, HIDDEN), normal(VOCAB, HIDDEN), normal(TOKENS, 48), normal(VOCAB, 48), weights]


def _loss_and_gradients(
    params: LogitsLoss, inputs: list[Tensor], kernels: KlKernels | None, chunk_tokens: int | None = None
) -> list[Tensor]:
    hidden, weight, teacher_hidden, teacher_weight, weights = inputs
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if kernels is None:
        teacher = live_teacher(teacher_hidden, teacher_weight, params, chunk_tokens=chunk_tokens)
    else:
        teacher = FusedForwardKl(teacher_hidden, teacher_weight, weights, params, kernels, chunk_tokens=chunk_tokens)  # type: ignore[assignment]
    labels = torch.zeros(TOKENS, dtype=torch.long, device=DEVICE)
    loss, parts = token_loss(Loss(logits=params), hidden, weight, labels, weights, teacher, chunk_tokens=chunk_tokens)
    loss.backward()
    assert parts["logits_loss"] == loss
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("params", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_the_fused_loss_equals_the_closed_form(name: str, params: LogitsLoss, chunk_tokens: int | None) -> None:
    inputs = _inputs(torch.float32)
    expected = _loss_and_gradients(params, inputs, None, chunk_tokens)
    found = _loss_and_gradients(params, inputs, kernels_of(name, on_gpu=ON_GPU), chunk_tokens)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_gradients_are_rounded_once(name: str) -> None:
    """Compared with the exact gradients of the same bf16 inputs and logits, each within bf16's precision."""
    inputs = _inputs(torch.bfloat16)
    exact = _loss_and_gradients(LogitsLoss(), [tensor.float() for tensor in inputs], None)
    closed = _loss_and_gradients(LogitsLoss(), inputs, None)
    found = _loss_and_gradients(LogitsLoss(), inputs, kernels_of(name, on_gpu=ON_GPU))
    for one, other, best in zip(found, closed, exact, strict=True):
        distance = (one.float() - best).norm() / best.norm()
        assert distance <= 1.1 * ((other.float() - best).norm() / best.norm()) + 1e-6
        assert distance <= 2**-6, "bf16 logits of this size are rounded by up to 1/16"


@pytest.mark.parametrize("name", NAMES)
def test_the_passes_have_the_gradient_of_autograd_far_from_zero(name: str) -> None:
    """Logits with a large offset, unlikely tokens, and rows that are views with a stride."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        (torch.randn(7, 2 * VOCAB, generator=generator) * 8 + offset).to(DEVICE)[:, :VOCAB] for offset in (200.0, -90.0)
    )
    weights = torch.rand(7, generator=generator).to(DEVICE)
    leaf = student.double().clone().requires_grad_()
    log_q, log_p = leaf.log_softmax(-1), teacher.double().log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1)
    (expected,) = torch.autograd.grad(loss @ weights.double(), leaf)
    kernels = kernels_of(name, on_gpu=ON_GPU)
    statistics = kernels.statistics(student, teacher, 1.0)
    torch.testing.assert_close(fused_kl.kl_of(statistics).double(), loss.detach(), rtol=1e-5, atol=1e-5)
    kernels.gradient_(student, teacher, statistics, weights, 1.0)
    torch.testing.assert_close(student.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_split_vocabulary_gives_the_statistics_of_the_whole(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(5, VOCAB, generator=generator).to(DEVICE) * 3 for _ in range(2))
    kernels = kernels_of(name, on_gpu=ON_GPU)
    whole = kernels.statistics(student, teacher, 1.0)
    parts = [
        kernels.statistics(student[:, rows], teacher[:, rows], 1.0) for rows in (slice(0, 1000), slice(1000, VOCAB))
    ]
    combined = _combined_by_two_ranks(parts)
    for found in combined:
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def _combined_by_two_ranks(parts: list[Tensor]) -> list[Tensor]:
    """Run both ranks in turn: each reduction returns what the ranks have sent, so the last pass has all values."""
    sent: dict[str, list[Tensor]] = {"max": [torch.empty(0)] * 2, "sum": [torch.empty(0)] * 2}
    found = list(parts)
    for _ in range(3):
        for rank, part in enumerate(parts):

            def reduce(kind: str, tensor: Tensor, rank: int = rank) -> Tensor:
                sent[kind][rank] = tensor
                given = torch.stack([one for one in sent[kind] if one.numel()])
                return given.amax(0) if kind == "max" else given.sum(0)

            vocab = Vocab(max=lambda t: reduce("max", t), sum=lambda t: reduce("sum", t))
            found[rank] = fused_kl.whole_statistics(part, vocab)
    return found


def test_torch_compile_makes_one_graph_of_each_pass() -> None:
    student, teacher, weights = torch.randn(4, 50), torch.randn(4, 50), torch.rand(4)
    statistics = torch.compile(fused_kl.statistics, fullgraph=True, backend="eager")(student, teacher, 1.0)
    expected = student.clone()
    fused_kl.gradient_(expected, teacher, statistics, weights, 1.0)
    torch.compile(fused_kl.gradient_, fullgraph=True, backend="eager")(student, teacher, statistics, weights, 1.0)
    torch.testing.assert_close(student, expected)


def test_only_a_lone_forward_kl_is_fused() -> None:
    lone = Loss()
    for loss in (
        Loss(next_token=0.5),
        Loss(next_token="balanced"),
        Loss(logits=LogitsLoss(kind="reverse_kl")),
        Loss(logits=LogitsLoss(sparse={"kind": "top_k", "k": 4})),
        Loss(logits=None, next_token=1.0),
    ):
        assert chosen("torch", loss, torch.float32, on_gpu=True) is None
    assert chosen("torch", lone, torch.float32, on_gpu=False) == "torch"
    assert chosen("off", lone, torch.float32, on_gpu=True) is None
    assert chosen("auto", lone, torch.float32, on_gpu=False) is None
    assert chosen("auto", lone, torch.bfloat16, on_gpu=True) == ("triton" if HAS_TRITON else None)
    assert chosen("auto", lone, torch.float64, on_gpu=True) is None


@pytest.mark.parametrize(
    ("name", "on_gpu", "has_triton", "needs", "allowed"),
    [
        ("triton", False, True, "a GPU", "auto, torch, off"),
        ("triton", False, False, "a GPU", "auto, torch, off"),
        ("triton", True, False, "the package triton", "auto, off"),
        ("torch", True, False, "the package triton", "auto, off"),
    ],
)
def test_kernels_that_cannot_run_on_this_machine_are_refused(
    name: str, on_gpu: bool, has_triton: bool, needs: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_kl, "find_spec", lambda _: object() if has_triton else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EnvironmentProblem, match=f"fused_kl = {name} needs {needs}") as caught:
        chosen(name, Loss(), torch.bfloat16, on_gpu=on_gpu)
    assert caught.value.allowed == allowed
    assert chosen("auto", Loss(), torch.bfloat16, on_gpu=on_gpu) is None
    assert chosen(name, Loss(next_token=0.5), torch.bfloat16, on_gpu=on_gpu) is None, "it is not fused anyway"


def test_a_fused_loss_with_another_term_is_refused() -> None:
    hidden, weight, teacher_hidden, teacher_weight, weights = _inputs(torch.float32)
    teacher = FusedForwardKl(teacher_hidden, teacher_weight, weights, LogitsLoss(), kernels_of("torch", on_gpu=False))
    loss = Loss(next_token=0.5)
    with pytest.raises(AssertionError, match="no other term"):
        token_loss(loss, hidden, weight, torch.zeros(TOKENS, dtype=torch.long), weights, teacher)
