"""Transformer Engine's core attention, which also keeps documents apart. Importable where it is installed."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEDotProductAttention

from nemo_minitron.backends.megatron.model.documents import AttentionInDocuments


class EngineAttention(AttentionInDocuments, TEDotProductAttention):  # type: ignore[misc]
    """TEDotProductAttention, also for an int32 mask with the bounds of documents."""
