"""Write Megatron indexed datasets."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

from nemo_minitron.data.tokenization import Document


class IndexedWriter:
    """One `<prefix>.bin/.idx` pair and its `.bytes.npy`, growing document by document."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self._builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(vocab_size))
        self._bytes = array("I")
        self.num_tokens = 0
        self.num_bytes = 0

    @property
    def num_documents(self) -> int:
        return len(self._bytes)

    def add(self, document: Document) -> None:
        self._builder.add_document(torch.from_numpy(document.ids), [len(document.ids)])
        self._bytes.append(document.num_bytes)
        self.num_tokens += len(document.ids)
        self.num_bytes += document.num_bytes

    def close(self) -> None:
        self._builder.finalize(get_idx_path(str(self.prefix)))
        np.save(f"{self.prefix}.bytes.npy", np.array(self._bytes, dtype=np.uint32), allow_pickle=False)


@contextmanager
def indexed_writers(*prefixes: Path, vocab_size: int) -> Iterator[tuple[IndexedWriter, ...]]:
    """Open writers, and finish their files when the work under them is done."""
    writers = tuple(IndexedWriter(prefix, vocab_size) for prefix in prefixes)
    yield writers
    for writer in writers:
        writer.close()
