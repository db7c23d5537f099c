"""Find which token ids occur in a tokenized dataset."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

_IDS_AT_A_TIME = 1 << 24


def used_ids(data_dir: Path, wanted: Collection[int]) -> set[int]:
    """Return the ids in `wanted` that occur in an indexed dataset of the folder; read each dataset once, in pieces."""
    found: set[int] = set()
    listed = np.array(sorted(wanted), dtype=np.int64)
    for file in sorted(data_dir.glob("*.bin")):
        if file.stat().st_size == 0:
            continue
        dtype = IndexedDataset(str(file.with_suffix("")), mmap=True).index.dtype
        ids = np.memmap(file, dtype=dtype, mode="r")
        for start in range(0, len(ids), _IDS_AT_A_TIME):
            piece = ids[start : start + _IDS_AT_A_TIME]
            found.update(np.unique(piece[np.isin(piece, listed)]).tolist())
    return found
