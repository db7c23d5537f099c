"""A rule for losses that compare hidden states of a teacher and a student. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.losses import Loss


def hidden_problems(key: str, loss: Loss, teacher: ModelShape | None, student: ModelShape | None) -> Iterator[str]:
    """Check that both models have the layers of `loss.hidden.pairs`, as far as their sizes are known.

    Args:
        key: full key of the loss.
    """
    if loss.hidden is None:
        return
    if not loss.hidden.num_states:
        yield f"{key}.hidden: compares nothing. Next: set pairs or embedding, or set hidden: null."
    for number, pair in enumerate(loss.hidden.pairs):
        for model, layer, shape in zip(("teacher", "student"), pair, (teacher, student), strict=True):
            if shape is not None and not -shape.num_layers <= layer < shape.num_layers:
                allowed = f"{-shape.num_layers} to {shape.num_layers - 1}"
                yield f"{key}.hidden.pairs.{number}: the {model} has no layer {layer}. Allowed: {allowed}."
