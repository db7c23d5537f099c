"""Differences between the supported versions of torch, 2.6 to 2.14. Those of Megatron-Core are in versions.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def attention(query: Tensor, key: Tensor, value: Tensor, may_look: Tensor | None, *, causal: bool = False) -> Tensor:
    """Compute torch's scaled_dot_product_attention with grouped queries.

    Before 2.9, torch's fused kernel for the CPU does not support groups. Torch then falls back to matrix products and
    keeps all scores for the backward pass, [B, heads, S, S] in every layer. To avoid that, each group becomes an
    entry of the batch.

    Args:
        query: [B, heads, S, head_dim].
        key, value: [B, groups, S, head_dim].
        may_look: [S, S] or [B or 1, 1, S, S].
    """
    groups = key.shape[1]
    grouped = query.shape[1] != groups
    if _VERSION >= (2, 9) or not grouped or query.device.type != "cpu":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=may_look, is_causal=causal, enable_gqa=grouped
        )
    q = query.unflatten(1, (groups, -1)).flatten(0, 1)
    # Views: all heads of a group read the same keys and values.
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (key, value))
    if may_look is not None and may_look.dim() == 4 and may_look.shape[0] > 1:
        may_look = may_look.repeat_interleave(groups, 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_look, is_causal=causal)
    return out.unflatten(0, (-1, groups)).flatten(1, 2)


__all__ = ["attention"]
