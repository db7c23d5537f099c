"""Floating-point operations of training, counted from shapes. No torch."""

from __future__ import annotations

from math import prod

from nemo_minitron.families import ModelShape
from nemo_minitron.families.registry import layers_of

BACKWARD_OVER_FORWARD = 2
"""Each matrix product of the forward pass has two in the backward pass."""


def forward_flops_per_token(shape: ModelShape, seq_len_tokens: int) -> float:
    """Return the operations of matrix products: the blocks of all layers, and the head.

    A product of [m, k] and [k, n] is 2 m k n operations, as in 2001.08361, section 2.1. Causal attention sees half of
    the sequence on average.
    """
    sizes = shape.axis_sizes()
    by_block = {
        block: sum(2.0 * prod(sizes[label] for label in row.axes) for row in block.rows(shape) if len(row.axes) > 1)
        + block.token_mixing_flops(shape, seq_len_tokens)
        for block in {block for layer in layers_of(shape) for block in layer}
    }
    return sum(by_block[block] for layer in layers_of(shape) for block in layer) + head_flops_per_token(shape)


def head_flops_per_token(shape: ModelShape) -> float:
    """Return the operations of the output layer in a forward pass."""
    return 2.0 * shape.hidden_size * shape.vocab_size


def training_flops_per_token(
    student: ModelShape, teacher: ModelShape | None, seq_len_tokens: int, *, teacher_learns: bool = False
) -> float:
    """Return the operations of the student's forward and backward pass and the teacher's forward pass.

    Recomputation is not counted.

    Args:
        teacher_learns: the teacher has a backward pass as well.
    """
    both = 1 + BACKWARD_OVER_FORWARD
    trained = both * forward_flops_per_token(student, seq_len_tokens)
    if teacher is None:
        return trained
    return trained + (both if teacher_learns else 1) * forward_flops_per_token(teacher, seq_len_tokens)


def frozen_backward_flops_per_token(shape: ModelShape, seq_len_tokens: int) -> float:
    """Return the operations of a backward pass that gives gradients to activations, and none to weights.

    A product with a weight has one product in it. One of two activations, as inside attention, has both.
    """
    forward = forward_flops_per_token(shape, seq_len_tokens)
    return forward + forward - forward_flops_per_token(shape, 0)


def layerwise_flops_per_token(student: ModelShape, teacher: ModelShape, seq_len_tokens: int) -> float:
    """Return the operations of layer-local distillation: as `training_flops_per_token`, but without the heads."""

    def layers(shape: ModelShape) -> float:
        return forward_flops_per_token(shape, seq_len_tokens) - head_flops_per_token(shape)

    return (1 + BACKWARD_OVER_FORWARD) * layers(student) + layers(teacher)
