"""Every loss of a chunk and its closed-form gradient, compared with the plain formula and autograd in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from nemo_minitron.distillation.hidden import Pair, Tap, pairs_of
from nemo_minitron.distillation.linear import linear_loss
from nemo_minitron.distillation.losses import LOSSES, balancing_weight, distance, forward_kl, next_token
from nemo_minitron.distillation.objective import live_teacher, token_loss
from nemo_minitron.distillation.sparse import sampled_teacher, sparse_distance, top_k_teacher, uniforms_of
from nemo_minitron.errors import PlanError
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.losses import HiddenLoss, LogitsLoss, Loss, Sampled, TopK
from nemo_minitron.schema.training import Optimization
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.stages.train.params import CorrectStage
from tests.support.plain_losses import plain_logits_loss


def _normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


CASES = [
    LogitsLoss(kind=kind, temperature=temperature, of=of, jsd_beta=0.2 if kind == "jsd" else 0.5)
    for kind in LOSSES
    for temperature in (1.0, 0.5, 3.0)
    for of in (("probabilities", "logits") if kind in ("mse", "cosine") else ("probabilities",))
]


@pytest.mark.parametrize("params", CASES, ids=lambda p: f"{p.kind}-{p.temperature}-{p.of}")
def test_loss_and_gradient_equal_the_formula(params: LogitsLoss) -> None:
    student, teacher, weight = _normal(15, 17, seed=0).requires_grad_(), _normal(15, 17, seed=1), _normal(15, seed=2)
    loss, grad = distance(student.detach().clone(), teacher.clone(), params)
    expected = plain_logits_loss(student, teacher, params)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-13)
    (expected * weight).sum().backward()
    torch.testing.assert_close(grad * weight[:, None], student.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("tail", ["ghost", "drop"])
@pytest.mark.parametrize(("temperature", "squared"), [(1.0, False), (2.0, False), (2.0, True)])
def test_top_k_equals_the_formula(k: int, tail: str, temperature: float, squared: bool) -> None:
    sparse = TopK(kind="top_k", k=k, tail=tail)
    params = LogitsLoss(temperature=temperature, times_temperature_squared=squared, sparse=sparse)
    student, teacher = _normal(9, 17, seed=0).requires_grad_(), _normal(9, 17, seed=1)
    kept = top_k_teacher(teacher.clone(), params.sparse, temperature)
    loss, grad = sparse_distance(student.detach().clone(), kept, params)
    expected = plain_logits_loss(student, teacher, params)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-12)
    expected.sum().backward()
    torch.testing.assert_close(grad, student.grad, rtol=1e-10, atol=1e-12)


def test_a_student_without_a_tail_still_has_a_finite_loss_and_gradient() -> None:
    """In fp32 its probabilities off the entries are zero, while the teacher's are not."""
    student = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    teacher = top_k_teacher(torch.tensor([[1.0, 0.5, 0.0, 0.0]]), TopK(kind="top_k", k=1), 1.0)
    loss, grad = sparse_distance(student, teacher, LogitsLoss(sparse=TopK(kind="top_k", k=1)))
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(grad[0, 0], 1.0 - teacher.probs[0, 0])
    assert torch.isfinite(grad).all()


def test_draws_are_the_cross_entropy_with_their_counts() -> None:
    student, teacher = _normal(9, 17, seed=0).requires_grad_(), _normal(9, 17, seed=1)
    drawn = sampled_teacher(teacher.clone(), uniforms_of(3, torch.tensor([5]), 9, 40), 2.0)
    params = LogitsLoss(temperature=2.0, sparse=Sampled(kind="sampled", rounds=40))
    loss, grad = sparse_distance(student.detach().clone(), drawn, params)
    counts = torch.zeros(9, 17, dtype=torch.float64).scatter_add_(-1, drawn.ids, torch.ones(9, 40, dtype=torch.float64))
    log_p = (teacher / 2).log_softmax(-1)
    expected = (log_p.exp() * log_p).sum(-1) - (counts / 40 * (student / 2).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-12)
    expected.sum().backward()
    torch.testing.assert_close(grad, student.grad, rtol=1e-10, atol=1e-12)


def test_draws_follow_the_teacher() -> None:
    """The mean gradient over many samples is that of the whole distribution."""
    student, teacher = _normal(1, 17, seed=0).expand(40_000, 17), _normal(1, 17, seed=1).expand(40_000, 17)
    drawn = sampled_teacher(teacher.clone(), uniforms_of(0, torch.tensor([0]), 40_000, 50), 1.0)
    loss, grad = sparse_distance(student.clone(), drawn, LogitsLoss(sparse=Sampled(kind="sampled")))
    whole, whole_grad = forward_kl(student[:1].clone(), teacher[:1].clone(), LogitsLoss())
    torch.testing.assert_close(grad.mean(0), whole_grad[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(loss.mean(0), whole[0], rtol=1e-2, atol=0)


def test_all_of_the_vocabulary_in_top_k_is_the_whole_loss() -> None:
    student, teacher = _normal(9, 17, seed=0), _normal(9, 17, seed=1)
    for tail in ("ghost", "drop"):
        params = LogitsLoss(sparse=TopK(kind="top_k", k=17, tail=tail))
        loss, grad = sparse_distance(student.clone(), top_k_teacher(teacher.clone(), params.sparse, 1.0), params)
        whole, whole_grad = forward_kl(student.clone(), teacher.clone(), LogitsLoss())
        torch.testing.assert_close(loss, whole, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grad, whole_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("params", CASES, ids=lambda p: f"{p.kind}-{p.temperature}-{p.of}")
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(params: LogitsLoss) -> None:
    logits = _normal(4, 11, seed=0)
    loss, grad = distance(logits.clone(), logits.clone(), params)
    assert loss.abs().max() < 1e-13
    assert grad.abs().max() < 1e-13


def test_temperature_squared_scales_loss_and_gradient() -> None:
    student, teacher = _normal(4, 11, seed=0), _normal(4, 11, seed=1)
    plain, plain_grad = distance(student.clone(), teacher.clone(), LogitsLoss(temperature=3.0))
    both = LogitsLoss(temperature=3.0, times_temperature_squared=True)
    loss, grad = distance(student.clone(), teacher.clone(), both)
    torch.testing.assert_close(loss, 9 * plain)
    torch.testing.assert_close(grad, 9 * plain_grad)


def test_next_token_is_the_cross_entropy() -> None:
    student, labels = _normal(6, 13, seed=0).requires_grad_(), torch.tensor([0, 12, 3, 3, 7, 1])
    loss, grad = next_token(student.detach().clone(), labels)
    expected = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    expected.sum().backward()
    torch.testing.assert_close(grad, student.grad, rtol=1e-12, atol=1e-12)


def test_draws_depend_on_seed_and_sample() -> None:
    one, same, other_seed, other_sample = (
        uniforms_of(seed, torch.tensor([number]), 4, 3) for seed, number in ((1, 5), (1, 5), (2, 5), (1, 6))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other_seed)
    assert not torch.equal(one, other_sample)


def _head(seed: int, width: int) -> tuple[Tensor, Tensor]:
    return _normal(20, width, seed=seed) / 3, _normal(31, width, seed=seed + 1) / 9


@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, None])
@pytest.mark.parametrize("next_token_weight", [0.0, 0.4, "balanced"])
def test_head_and_loss_together_are_exact_for_every_chunk_size(
    chunk_tokens: int | None, next_token_weight: float
) -> None:
    (hidden, weight), (teacher_hidden, teacher_weight) = _head(0, 8), _head(5, 6)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    labels, tokens = torch.arange(20), torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = Loss(next_token=next_token_weight)
    teacher = live_teacher(teacher_hidden, teacher_weight, params.logits, chunk_tokens=chunk_tokens)
    loss, parts = token_loss(params, hidden, weight, labels, tokens, teacher, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad(3.0 * loss, (hidden, weight))

    student = hidden @ weight.t()
    kl = plain_logits_loss(student, teacher_hidden @ teacher_weight.t(), params.logits) @ tokens
    text = torch.nn.functional.cross_entropy(student, labels, reduction="none") @ tokens
    factor = (kl / text).detach() if next_token_weight == "balanced" else next_token_weight
    expected = kl + factor * text
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts["logits_loss"], kl.detach(), rtol=1e-12, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(3.0 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def _negative_teacher(student: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """A distance whose estimate is below 0, as over tokens that are drawn unluckily."""
    return student.new_full((len(student),), -0.2), torch.zeros_like(student)


def test_a_balanced_text_loss_is_never_learned_backwards() -> None:
    (hidden, weight), labels, tokens = _head(0, 8), torch.arange(20), torch.full((20,), 0.05, dtype=torch.float64)
    loss, parts = token_loss(
        Loss(next_token="balanced"), hidden.requires_grad_(), weight, labels, tokens, _negative_teacher
    )
    assert float(parts["logits_loss"]) == pytest.approx(-0.2)
    assert loss.item() == pytest.approx(-0.2)
    assert torch.autograd.grad(loss, hidden)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("of", "to", "expected"),
    [(0.5, 2.0, 4.0), (0.5, 0.0, 0.0), (0.5, -2.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.3, 0.0), (-6e-8, 0.3, 0.0)],
)
def test_a_balancing_weight_is_finite_and_not_negative(of: float, to: float, expected: float) -> None:
    assert balancing_weight(torch.tensor(of), torch.tensor(to)).item() == expected


def test_a_balancing_weight_is_the_plain_ratio_otherwise() -> None:
    of, to = torch.rand(100) + 1e-3, torch.rand(100)
    assert torch.equal(balancing_weight(of, to), to / of)
    assert balancing_weight(torch.tensor(0.5), torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("hidden_loss", [0.0, -6e-8])
def test_hidden_states_that_are_still_equal_have_no_dynamic_weight(hidden_loss: float) -> None:
    """Embeddings are equal at the first step of a student that lacks only layers."""
    from nemo_minitron.backends.megatron.distillation.hidden import HiddenLossWeight, HiddenStates, share_weight
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(Parallel(), device="cpu") as session:
        hidden = HiddenStates(HiddenLoss(pairs=()), [], [], [], 8, session, 1, None)
        found = share_weight(hidden, HiddenLossWeight(hidden), torch.tensor(0.7), torch.tensor(hidden_loss))
    assert found.item() == 0.0


def test_bf16_logits_are_reduced_in_fp32() -> None:
    (hidden, weight), labels = _head(0, 8), torch.arange(20)
    tokens = torch.full((20,), 0.05)
    loss, parts = token_loss(Loss(logits=None, next_token=1.0), hidden.bfloat16(), weight.bfloat16(), labels, tokens)
    assert loss.dtype == parts["lm_loss"].dtype == torch.float32
    logits = hidden.bfloat16().double() @ weight.bfloat16().double().t()
    torch.testing.assert_close(loss.double(), torch.nn.functional.cross_entropy(logits, labels), rtol=3e-3, atol=0)


def test_the_gradient_cannot_be_taken_twice_by_accident() -> None:
    hidden, weight = (tensor.requires_grad_() for tensor in _head(0, 8))
    loss = linear_loss(hidden, weight, torch.ones(20), lambda z, rows: next_token(z, torch.arange(20)[rows]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_pairs_are_the_papers_by_default() -> None:
    """Teacher of 32 layers, student of 16: embeddings, and 29:13 counted from 0 (2407.14679, table 17)."""
    pairs = pairs_of(HiddenLoss(), 32, 16)
    assert pairs == [Pair(Tap(0, "input"), Tap(0, "input")), Pair(Tap(30, "input"), Tap(14, "input"))]
    last = pairs_of(HiddenLoss(embedding=False, pairs=((-1, -1),)), 32, 16)
    assert last == [Pair(Tap(32, "input"), Tap(16, "input"))], "the last block is read after the final norm"


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match=r"pairs.0: the student has no layer 16") as error:
        pairs_of(HiddenLoss(pairs=((3, 16),)), 32, 16)
    assert error.value.allowed == "-16 to 15"


@pytest.mark.parametrize(
    "keys",
    [
        {"logits": None},
        {"logits": None, "next_token": "balanced"},
        {"logits": None, "next_token": 1.0, "hidden": {}},
        {"logits": {"kind": "mse", "sparse": {"kind": "top_k", "k": 3}}},
    ],
)
def test_losses_that_make_no_sense_are_refused(keys: dict) -> None:
    with pytest.raises(ValidationError):
        Loss.model_validate(keys)


def test_teacher_correction_has_the_papers_settings() -> None:
    keys = {"kind": "correct", "pretraining_lr": 3e-4, "num_steps": 500, "global_batch_size": 8, "seq_len_tokens": 64}
    stage = CorrectStage.model_validate(keys)
    assert math.isclose(stage.lr, 6e-5)
    assert stage.warmup_steps == 120
    assert CorrectStage.model_validate({**keys, "lr": 1e-5}).lr == 1e-5


def test_a_teacher_corrected_during_distillation_is_trained_as_by_the_stage() -> None:
    shared = {"num_steps": 500, "global_batch_size": 8, "seq_len_tokens": 64, "adam_beta2": 0.9, "seed": 5}
    stage = CorrectStage.model_validate({"kind": "correct", "pretraining_lr": 3e-4, "min_lr": 1e-6, **shared})
    rate = {"pretraining_lr": 3e-4, "min_lr": 1e-6}
    distill = DistillStage.model_validate({"kind": "distill", "lr": 1e-2, "teacher_correction": rate, **shared})
    assert distill.of_teacher == Optimization(**{key: getattr(stage, key) for key in Optimization.model_fields})
    assert DistillStage.model_validate({"kind": "distill", "lr": 1e-2, **shared}).of_teacher is None
