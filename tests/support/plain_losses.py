"""Every distillation loss as a plain formula of whole tensors, with autograd; the reference for the package's losses.

Shapes: logits [T, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_minitron.schema.losses import LogitsLoss, TopK


def plain_logits_loss(student: Tensor, teacher: Tensor, params: LogitsLoss) -> Tensor:
    """Return the loss [T], differentiable with respect to the student."""
    loss = _unscaled(student, teacher, params)
    return loss * params.temperature**2 if params.times_temperature_squared else loss


def _unscaled(student: Tensor, teacher: Tensor, params: LogitsLoss) -> Tensor:
    z_s, z_t = student / params.temperature, teacher / params.temperature
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if isinstance(params.sparse, TopK):
        return plain_top_k(log_q, log_p, params.sparse)
    if params.kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if params.kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if params.kind == "jsd":
        beta = params.jsd_beta
        log_m = (beta * p + (1 - beta) * q).log()
        return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    a, b = (z_s, z_t) if params.of == "logits" else (q, p)
    if params.kind == "mse":
        return (a - b).square().sum(-1)
    return 1 - torch.cosine_similarity(a, b, dim=-1)


def plain_top_k(log_q: Tensor, log_p: Tensor, params: TopK) -> Tensor:
    """Return forward KL over the teacher's k most likely tokens and one for the rest, or rescaled to k tokens."""
    ids = log_p.topk(params.k, -1).indices
    log_q_k, log_p_k = log_q.gather(-1, ids), log_p.gather(-1, ids)
    if params.tail == "drop":
        log_q_k, log_p_k = log_q_k.log_softmax(-1), log_p_k.log_softmax(-1)
        return (log_p_k.exp() * (log_p_k - log_q_k)).sum(-1)
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, ids, False)
    tail_p = torch.where(others, log_p.exp(), 0.0).sum(-1)
    tail_q = torch.where(others, log_q.exp(), 0.0).sum(-1)
    return (log_p_k.exp() * (log_p_k - log_q_k)).sum(-1) + tail_p * (tail_p.log() - tail_q.log())


def plain_draws(student: Tensor, teacher: Tensor, uniforms: Tensor) -> Tensor:
    """Draw by the inverse of the whole cumulative distribution."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    edges = log_p.exp().cumsum(-1)
    ids = torch.searchsorted(edges, uniforms.to(edges.dtype) * edges[:, -1:], right=True)
    return (log_p.exp() * log_p).sum(-1) - log_q.gather(-1, ids).mean(-1)


def plain_state_loss(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the distance [...] of states [..., D]."""
    if kind == "mse":
        return ((student - teacher) ** 2).mean(-1)
    dot = (student * teacher).sum(-1)
    return 1 - dot / (student.norm(dim=-1) * teacher.norm(dim=-1))
