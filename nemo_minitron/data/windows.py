"""Cut held-out documents into windows so that every text token is predicted exactly once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Windows:
    """Fixed-length windows over a stream of whole documents."""

    tokens: NDArray[np.int64]
    """[N, S + 1]: inputs are [:, :-1], labels [:, 1:]."""
    loss_mask: NDArray[np.bool_]
    """[N, S]: True where the label is a text token, not eod or padding."""
    num_bytes: int
    """UTF-8 bytes of the documents."""


def heldout_windows(
    documents: Iterable[NDArray[np.integer]],
    document_bytes: Iterable[int],
    *,
    eod_id: int,
    num_tokens: int,
    seq_len_tokens: int,
) -> Windows:
    """Take whole documents until they hold at least `num_tokens` tokens, and cut them into windows.

    The stream is `eod doc eod doc eod ...`. Neighboring windows share one token, so that each token is a label
    exactly once. The last window is padded with eod, which is masked out of the loss.

    Args:
        documents: token ids of each document, ending in eod.
        document_bytes: UTF-8 size of each document's text.
    """
    stream = [np.array([eod_id])]
    total, num_bytes = 0, 0
    for document, size in zip(documents, document_bytes, strict=False):
        stream.append(np.asarray(document, dtype=np.int64))
        total += len(document)
        num_bytes += size
        if total >= num_tokens:
            break
    ids = np.concatenate(stream).astype(np.int64)
    num_windows = max(1, -(-(len(ids) - 1) // seq_len_tokens))
    padded = np.full(num_windows * seq_len_tokens + 1, eod_id, dtype=np.int64)
    padded[: len(ids)] = ids
    starts = np.arange(num_windows) * seq_len_tokens
    tokens = padded[starts[:, None] + np.arange(seq_len_tokens + 1)]
    return Windows(tokens, tokens[:, 1:] != eod_id, num_bytes)
