"""Descriptions of losses, for model cards and logs. Importing this module does not import torch."""

from __future__ import annotations

from nemo_minitron.schema.losses import AnchorLoss, HiddenLoss, LogitsLoss, Loss, Sampled


def loss_in_words(loss: Loss, *, cached: bool = False, corrected: bool = False) -> str:
    """Describe the loss of a training.

    Args:
        cached: the teacher's distributions were read from a cache.
        corrected: the teacher was trained as well (teacher correction).
    """
    teacher = "the cached teacher" if cached else "the live and corrected teacher" if corrected else "the live teacher"
    parts = [] if loss.logits is None else [_logits(loss.logits, teacher)]
    if loss.next_token:
        weight = "balanced with it" if loss.next_token == "balanced" else f"weight {loss.next_token:g}"
        parts.append("next-token cross entropy" + (f" ({weight})" if parts else ""))
    if loss.hidden is not None:
        parts.append(_hidden(loss.hidden))
    if loss.anchors is not None:
        parts.append(_anchors(loss.anchors))
    return f"{parts[0]}, no other loss" if len(parts) == 1 else ", ".join(parts)


def _logits(logits: LogitsLoss, teacher: str) -> str:
    from nemo_minitron.distillation.losses import LOSSES

    text = LOSSES[logits.kind].describe(teacher, beta=logits.jsd_beta, of=logits.of)
    if logits.temperature != 1.0:
        text += f" at temperature {logits.temperature:g}"
    if isinstance(logits.sparse, Sampled):
        text += f", {logits.sparse.rounds} draws a token"
    elif logits.sparse is not None:
        text += f", its {logits.sparse.k} likeliest tokens"
    return text


def _hidden(hidden: HiddenLoss) -> str:
    pairs = ", ".join(f"{teacher}:{student}" for teacher, student in hidden.pairs)
    places = [f"layers {pairs} (teacher:student)"] if pairs else []
    if hidden.embedding:
        places.append("embeddings")
    return f"{hidden.kind} distance of hidden states ({', '.join(places)})"


def _anchors(anchors: AnchorLoss) -> str:
    places = ", ".join(name.replace("_", " ") for name in anchors.of)
    until = "the last step" if anchors.decay_steps is None else f"step {anchors.decay_steps}"
    return f"relative squared error inside the layers ({places}; weight {anchors.weight:g}, falling to 0 by {until})"
