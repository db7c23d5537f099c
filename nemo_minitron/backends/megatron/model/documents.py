"""Attention inside the documents of packed samples: by a mask for torch, by the bounds of documents for other kernels.

Transformer Engine's causal attention ignores a mask, but takes sequences of different lengths one behind the other
(format thd), which also saves the work between documents. Everything else in a model sees whole samples: rotary
positions are relative, so only the core attention needs the bounds. They travel as the attention mask, as int32.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def mask_between_documents(tokens_BS: Tensor, eod_id: int) -> Tensor:
    """Return [B, 1, S, S], True where the query (dim 2) must not attend to the key: later tokens and other documents.

    An end-of-document token belongs to the document that it ends. Rotary positions are relative and need no reset.
    """
    ends = (tokens_BS == eod_id).long()
    document = ends.cumsum(1) - ends
    length = tokens_BS.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=tokens_BS.device).triu(1)
    return (later | (document[:, :, None] != document[:, None, :]))[:, None]


def document_bounds(tokens_BS: Tensor, eod_id: int) -> Tensor:
    """Return the first position of each document in [B * S] and the end of the last one, int32 [documents + 1]."""
    starts = torch.ones_like(tokens_BS, dtype=torch.bool)
    starts[:, 1:] = tokens_BS[:, :-1] == eod_id
    first = starts.flatten().nonzero()[:, 0]
    return torch.cat([first, first.new_tensor([tokens_BS.numel()])]).int()


class AttentionInDocuments:
    """Mixin for a core attention of Megatron that takes packed sequences: an int32 mask is the bounds of documents.

    Shapes: query [S, B, heads, head_dim], key and value [S, B, groups, head_dim]; returns [S, B, heads * head_dim].
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        attend: Any = super().forward  # type: ignore[misc]
        if attention_mask is None or attention_mask.dtype != torch.int32:
            out: Tensor = attend(query, key, value, attention_mask, *args, **options)
            return out
        length, batch = query.shape[:2]
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=attention_mask,
            cu_seqlens_kv=attention_mask,
            # An upper bound, because the longest document is known to the device only.
            max_seqlen_q=length,
            max_seqlen_kv=length,
        )
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        flat: Tensor = attend(q, k, v, None, *args, **{**options, "packed_seq_params": packed})
        return flat.view(batch, length, -1).transpose(0, 1).contiguous()
