"""Losses against a teacher whose distribution is known at a few tokens only: the most likely ones, or random draws.

Shapes: n tokens of a chunk, V the vocabulary part of this rank, K entries a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_minitron.distillation.losses import LossAndGrad, scaled
from nemo_minitron.distillation.vocab import WHOLE, Vocab, local_ids, pick, shift, softmax
from nemo_minitron.schema.losses import LogitsLoss, Sampled, TopK


@dataclass(frozen=True)
class SparseTeacher:
    """Distributions of a teacher at some ids. Entries with probability 0 are padding."""

    ids: Tensor
    """Vocabulary ids [n, K], int64. Drawn ids may repeat."""
    probs: Tensor
    """Their probabilities [n, K]; the rest is the tail. Each draw has 1 / rounds, so that draws have no tail."""
    negative_entropy: Tensor
    """The term that turns the cross entropy into a KL [n]: sum p log p over entries and tail, or over all tokens."""
    may_have_tail: bool = True
    """False if the probabilities sum to 1. Known without reading them, because that would wait for the GPU."""

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseTeacher:
        """Apply a function to each tensor."""
        return replace(
            self,
            ids=function(self.ids),
            probs=function(self.probs),
            negative_entropy=function(self.negative_entropy),
        )

    def to(self, device: torch.device) -> SparseTeacher:
        return self.map(lambda tensor: tensor.to(device))

    def rows(self, rows: slice) -> SparseTeacher:
        return self.map(lambda tensor: tensor[rows])


def top_k_teacher(logits: Tensor, params: TopK, temperature: float, vocab: Vocab = WHOLE) -> SparseTeacher:
    """Keep the k most likely tokens of each distribution; with tail "drop" their probabilities are scaled to 1."""
    t = softmax(logits, temperature, vocab)
    values, local = t.shifted.topk(min(params.k, logits.shape[-1]), -1)
    # A rank with fewer tokens than the others adds entries that are worse than any token.
    missing = min(params.k, vocab.rows or logits.shape[-1]) - values.shape[-1]
    values = F.pad(values, (0, missing), value=torch.finfo(values.dtype).min)
    # The k best of all tokens are among the k best of each rank.
    values, ids = vocab.gather(values), vocab.gather(F.pad(local + vocab.start, (0, missing)))
    values, order = values.topk(min(params.k, vocab.size or values.shape[-1]), -1)
    log_probs = values - t.total.log()
    if params.tail == "drop":
        log_probs = log_probs - log_probs.logsumexp(-1, keepdim=True)
    probs = log_probs.exp()
    tail = tail_of(probs)
    negative_entropy = (probs * log_probs).sum(-1) + torch.xlogy(tail, tail)
    return SparseTeacher(ids.gather(-1, order), probs, negative_entropy, may_have_tail=params.tail != "drop")


def sampled_teacher(logits: Tensor, uniforms: Tensor, temperature: float, vocab: Vocab = WHOLE) -> SparseTeacher:
    """Draw ids from each distribution, `rounds` times with replacement (2503.16870, section 3).

    The cross entropy with the draws, and its gradient, are unbiased estimates of those with the whole distribution. The
    entropy is exact, so the loss is an estimate of the KL.

    Args:
        uniforms: random numbers [n, rounds] in [0, 1), equal on all ranks that share the vocabulary.
    """
    t = softmax(logits, temperature, vocab)
    probs = t.probs
    negative_entropy = vocab.sum((probs * t.log_probs).sum(-1))
    mass = vocab.gather(probs.sum(-1, keepdim=True))
    edges = mass.cumsum(-1)
    # fp32 probabilities do not sum to exactly 1: the draws are spread over their sum.
    points = (uniforms.to(probs.dtype) * edges[:, -1:]).contiguous()
    sizes = vocab.gather(torch.full_like(edges[:, :1], logits.shape[-1]))
    # A tensor: reading its value would wait for the GPU.
    rank = (sizes.cumsum(-1) <= vocab.start).sum(-1, keepdim=True)
    before = edges.gather(-1, rank) - mass.gather(-1, rank)
    found = torch.searchsorted(probs.cumsum(-1), points - before, right=True).clamp(max=logits.shape[-1] - 1)
    owner = torch.searchsorted(edges.contiguous(), points, right=True).clamp(max=edges.shape[-1] - 1)
    ids = vocab.sum(torch.where(owner == rank, found + vocab.start, 0))
    probs = torch.full_like(points, 1.0 / points.shape[-1])
    return SparseTeacher(ids, probs, negative_entropy, may_have_tail=False)


def uniforms_of(seed: int, sample_ids_B: Tensor, seq_len_tokens: int, rounds: int) -> Tensor:
    """Return random numbers [B * S, rounds] in [0, 1) that depend on the sample, not on its batch or the layout."""
    generator = torch.Generator()
    points = []
    for number in sample_ids_B.tolist():
        # Hashed, because the generator uses 32 bits only, and consecutive samples must not be correlated.
        digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:4], "little"))
        points.append(torch.rand(seq_len_tokens, rounds, generator=generator))
    return torch.cat(points)


def tail_of(probs: Tensor) -> Tensor:
    """Return the probability that the entries lack [n]; less than the rounding error counts as 0."""
    tail = 1.0 - probs.sum(-1)
    return torch.where(tail > 4.0 * torch.finfo(probs.dtype).eps * probs.shape[-1], tail, torch.zeros_like(tail))


def sparse_kl(student: Tensor, teacher: SparseTeacher, temperature: float, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Compute the forward KL to a sparse teacher; all other tokens count as one ghost token, for both models.

    With entries K, tails P = 1 - sum_K p and Q = 1 - sum_K q: `sum_K p log(p / q) + P log(P / Q)`, nats. The gradient
    is (q - t) / T with t = p at the entries and P q / Q elsewhere.
    """
    shifted, valid = shift(student, temperature, vocab), teacher.probs > 0
    at = pick(shifted, teacher.ids, vocab)
    exp = shifted.exp_()
    total = vocab.sum(exp.sum(-1, keepdim=True))
    log_q = at - total.log()
    cross_entropy = -(teacher.probs * torch.where(valid, log_q, 0.0)).sum(-1)
    local, mine = local_ids(teacher.ids, exp.shape[-1], vocab)
    at_entries = -teacher.probs
    if teacher.may_have_tail:
        tail_p = tail_of(teacher.probs)[:, None]
        # Sum the tail without the entries: 1 - their sum would lose it to rounding.
        _clear(exp, local, valid & mine)
        tail_q = (vocab.sum(exp.sum(-1, keepdim=True)) / total).clamp_min(torch.finfo(exp.dtype).tiny)
        cross_entropy -= torch.where(tail_p > 0, tail_p * tail_q.log(), 0.0).squeeze(-1)
        exp.mul_(1.0 - tail_p / tail_q)
        at_entries = log_q.exp() - teacher.probs
    grad = exp.div_(total).scatter_add_(-1, local, torch.where(valid & mine, at_entries, 0.0).to(exp.dtype))
    return teacher.negative_entropy + cross_entropy, grad if temperature == 1.0 else grad.div_(temperature)


def renormalized_kl(student: Tensor, teacher: SparseTeacher, temperature: float, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Compute the forward KL between the softmaxes over the teacher's entries only; both models lose their tails."""
    at = pick(student, teacher.ids, vocab) / temperature
    log_q = torch.where(teacher.probs > 0, at, -torch.inf).log_softmax(-1)
    loss = teacher.negative_entropy - (teacher.probs * torch.where(teacher.probs > 0, log_q, 0.0)).sum(-1)
    grad = torch.zeros_like(student)
    local, mine = local_ids(teacher.ids, student.shape[-1], vocab)
    grad.scatter_add_(-1, local, (log_q.exp() - teacher.probs).to(grad.dtype) * mine / temperature)
    return loss, grad


def sparse_distance(student: Tensor, teacher: SparseTeacher, params: LogitsLoss, vocab: Vocab = WHOLE) -> LossAndGrad:
    """Compute the loss of the recipe against a sparse teacher, times T^2 if `times_temperature_squared` is set."""
    drops = isinstance(params.sparse, TopK) and params.sparse.tail == "drop"
    kl = renormalized_kl if drops else sparse_kl
    return scaled(kl(student, teacher, params.temperature, vocab), params)


def sparsify(
    logits: Tensor, params: TopK | Sampled, temperature: float, uniforms: Tensor | None, vocab: Vocab
) -> SparseTeacher:
    """Reduce a teacher's logits as `sparse` in the recipe requires."""
    if isinstance(params, TopK):
        return top_k_teacher(logits, params, temperature, vocab)
    assert uniforms is not None, "draws need uniforms"
    return sampled_teacher(logits, uniforms, temperature, vocab)


def _clear(values: Tensor, local: Tensor, chosen: Tensor) -> None:
    """Set the chosen columns to zero, in place; no value is negative."""
    # A column may be in `local` twice, chosen and not chosen: the minimum is zero.
    values.scatter_reduce_(-1, local, torch.where(chosen, 0.0, values.gather(-1, local)), "amin")
