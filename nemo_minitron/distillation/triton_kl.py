"""The two passes of fused_kl.py as Triton kernels. Each program computes one token.

With TRITON_INTERPRET=1, set before the import, they run on the CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 4096, 16
"""Logits of a token that a program loads at once, and its warps: eight logits for each thread."""


def statistics(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute the statistics of both distributions [5, n] in fp32, as fused_kl.statistics does."""
    num_tokens, size = student.shape
    found = torch.empty(5, num_tokens, dtype=torch.float32, device=student.device)
    strides = (student.stride(0), teacher.stride(0))
    _statistics[(num_tokens,)](
        student, teacher, found, *strides, num_tokens, size, 1.0 / temperature, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return found


def gradient_(student: Tensor, teacher: Tensor, found: Tensor, weights: Tensor, temperature: float) -> None:
    """Overwrite the student's logits with weight (p_s - p_t), as fused_kl.gradient_ does."""
    num_tokens, size = student.shape
    strides = (student.stride(0), teacher.stride(0))
    found, weights = found.contiguous(), weights.to(torch.float32).contiguous()
    _gradient[(num_tokens,)](
        student,
        teacher,
        found,
        weights,
        *strides,
        num_tokens,
        size,
        1.0 / temperature,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


@triton.jit
def _statistics(
    student, teacher, found, stride_s, stride_t, num_tokens, size, inverse_temperature, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    student += token * stride_s
    teacher += token * stride_t
    inside = columns < size
    s = tl.load(student + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
    t = tl.load(teacher + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
    # Maxima of the first block, so that no difference of infinities can occur below.
    max_s, max_t = tl.max(s, 0), tl.max(t, 0)
    sum_s, sum_t, dot = 0.0, 0.0, 0.0
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        t = tl.load(teacher + start + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        higher_s, higher_t = tl.maximum(max_s, tl.max(s, 0)), tl.maximum(max_t, tl.max(t, 0))
        down_s, down_t = max_s - higher_s, max_t - higher_t
        dot = tl.exp(down_t) * (dot + sum_t * (down_t - down_s))
        sum_s, sum_t = sum_s * tl.exp(down_s), sum_t * tl.exp(down_t)
        max_s, max_t = higher_s, higher_t
        s, t = s - max_s, t - max_t
        exp_t = tl.exp(t)
        sum_s += tl.sum(tl.exp(s), 0)
        sum_t += tl.sum(exp_t, 0)
        dot += tl.sum(tl.where(inside, exp_t * (t - s), 0.0), 0)
    tl.store(found + token, max_s)
    tl.store(found + num_tokens + token, sum_s)
    tl.store(found + 2 * num_tokens + token, max_t)
    tl.store(found + 3 * num_tokens + token, sum_t)
    tl.store(found + 4 * num_tokens + token, dot)


@triton.jit
def _gradient(
    student, teacher, found, weights, stride_s, stride_t, num_tokens, size, inverse_temperature, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    student += token * stride_s
    teacher += token * stride_t
    weight = tl.load(weights + token)
    max_s, max_t = tl.load(found + token), tl.load(found + 2 * num_tokens + token)
    scale_s = 1.0 / tl.load(found + num_tokens + token)
    scale_t = 1.0 / tl.load(found + 3 * num_tokens + token)
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        s = tl.load(student + start + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        t = tl.load(teacher + start + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        gradient = (tl.exp(s - max_s) * scale_s - tl.exp(t - max_t) * scale_t) * weight
        tl.store(student + start + columns, gradient.to(student.dtype.element_ty), mask=inside)
