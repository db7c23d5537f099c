"""Floating-point operations of training, counted from shapes. No torch."""

from __future__ import annotations

from nemo_minitron.families import ModelShape

BACKWARD_OVER_FORWARD = 2
"""Each matrix product of the forward pass has two in the backward pass."""


def forward_flops_per_token(shape: ModelShape, seq_len_tokens: int) -> float:
    """Of matrix products: projections, MLP, head, and causal attention (on average half of the sequence is seen).

    A product of [m, k] and [k, n] is 2 m k n operations, as in 2001.08361, section 2.1.
    """
    heads = shape.num_attention_heads * shape.kv_channels
    groups = shape.num_query_groups * shape.kv_channels
    attention = shape.hidden_size * (2 * heads + 2 * groups)
    mlp = shape.hidden_size * shape.ffn_hidden_size * (3 if shape.gated else 2)
    scores = 2 * heads * seq_len_tokens / 2
    head = shape.hidden_size * shape.vocab_size
    return 2.0 * (shape.num_layers * (attention + mlp + scores) + head)


def training_flops_per_token(
    student: ModelShape, teacher: ModelShape | None, seq_len_tokens: int, *, teacher_learns: bool = False
) -> float:
    """Forward and backward of what is trained, and the forward pass of its teacher; recomputation is not counted."""
    both = 1 + BACKWARD_OVER_FORWARD
    trained = both * forward_flops_per_token(student, seq_len_tokens)
    if teacher is None:
        return trained
    return trained + (both if teacher_learns else 1) * forward_flops_per_token(teacher, seq_len_tokens)
