"""Head-residual merging: cut heads are merged into kept ones (2407.14679, section 2.3).

With L heads in order of importance, of which K are kept: `new_i = head_i + (head_i - head_(2K-i+1))` for the last
min(K, L - K) kept heads. Cut head K + 1 is merged into kept head K, K + 2 into K - 1, and so on. (The printed range
begins one too early: at i = K - (L - K) the partner would be head L + 1.) Layer Collapse, which the paper follows, adds
the difference with the opposite sign, `head_i + (head_(2K-i+1) - head_i)`: for a single partner that is the cut head
itself. `mean` is the mean of the kept and the cut head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.families import ModelShape

SHARES: Mapping[str, tuple[float, float]] = {
    "printed": (2.0, -1.0),
    "opposite": (0.0, 1.0),
    "mean": (0.5, 0.5),
}
"""Factors of the kept head and of the cut one."""


def head_partners(
    scores_H: Tensor, kept: tuple[int, ...], groups: tuple[int, ...], source: ModelShape
) -> dict[int, int]:
    """Return kept head -> the cut head that is merged into it.

    Heads are merged within each query group that stays, because these heads share key and value. If each head is its
    own group, all heads are candidates, and their keys and values are merged as well.
    """
    per_group = source.heads_per_group
    if per_group == 1:
        return _pairs(scores_H, list(range(source.num_attention_heads)), set(kept))
    out: dict[int, int] = {}
    for group in groups:
        out |= _pairs(scores_H, list(range(group * per_group, (group + 1) * per_group)), set(kept))
    return out


def _pairs(scores_H: Tensor, heads: list[int], kept: set[int]) -> dict[int, int]:
    order = torch.argsort(scores_H[heads].double(), descending=True, stable=True).tolist()
    ranked = [heads[place] for place in order]
    stay = [head for head in ranked if head in kept]
    go = [head for head in ranked if head not in kept]
    return dict(zip(reversed(stay), go, strict=False))


def merge_heads(tensor: Tensor, dim: int, partners: Mapping[int, int], kv_channels: int, how: str) -> Tensor:
    """Return a copy with cut heads merged into kept ones; head h has the rows [h * kv_channels, (h + 1) * kv_channels).

    Args:
        dim: the dimension that is made of heads.
        how: a key of SHARES.
    """
    if not partners:
        return tensor
    own, other = SHARES[how]
    heads = tensor.unflatten(dim, (-1, kv_channels))
    kept, cut = (torch.tensor(list(numbers)) for numbers in (partners.keys(), partners.values()))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    mixed = own * heads.index_select(dim, kept).to(wide) + other * heads.index_select(dim, cut).to(wide)
    return heads.index_copy(dim, kept, mixed.to(tensor.dtype)).flatten(dim, dim + 1)
