"""The matrix product that accumulates the gradient of a weight.

Shapes: n tokens of a chunk, D hidden size, V this rank's part of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE_OUTPUT = "dtype_out" in torch.ops.aten.addmm.overloads()
"""Whether torch can add a product of bf16 matrices to an fp32 matrix on a GPU, without rounding it (since 2.8)."""


def add_product(out_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor, scale: float = 1.0) -> None:
    """Compute out += scale * grad.T @ hidden.

    If out is more precise than the factors, only a GPU with torch 2.8 or later adds the product unrounded; elsewhere
    the product of each chunk is rounded to the precision of the factors first.
    """
    if out_VD.dtype == grad_nV.dtype:
        out_VD.addmm_(grad_nV.t(), hidden_nD, alpha=scale)
    elif out_VD.is_cuda and out_VD.dtype == torch.float32 and _WIDE_OUTPUT:
        torch.addmm(out_VD, grad_nV.t(), hidden_nD, out_dtype=torch.float32, alpha=scale, out=out_VD)
    else:
        out_VD.add_(grad_nV.t() @ hidden_nD, alpha=scale)
