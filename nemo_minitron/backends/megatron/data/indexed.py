"""Write Megatron indexed datasets."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, get_bin_path, get_idx_path
from numpy.typing import NDArray

_HEADER, _VERSION = b"MMIDIDX\x00\x00", 1


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Return the integer type that stores token ids of this vocabulary."""
    return np.dtype(DType.optimal_dtype(vocab_size))


class IndexedWriter:
    """One `<prefix>.bin/.idx` pair and its `.bytes.npy`.

    Megatron's builder keeps lists of Python numbers, which for a few hundred million documents need more memory than a
    node has. The files are identical.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self._out = Path(get_bin_path(str(prefix))).open("wb")  # noqa: SIM115
        self._lengths, self._bytes = bytearray(), bytearray()
        """Bytes of an int32 and a uint32 array."""
        self.num_documents = 0
        self.num_tokens = 0
        self.num_bytes = 0

    def add_run(self, ids: memoryview, lengths: NDArray[np.int64], num_bytes: NDArray[np.int64]) -> None:
        """Add consecutive documents.

        Args:
            ids: bytes of all their token ids, in the type of the dataset.
            lengths: number of tokens of each document.
            num_bytes: UTF-8 size of each text.
        """
        self._out.write(ids)
        self._lengths += lengths.astype(np.int32).tobytes()
        self._bytes += num_bytes.astype(np.uint32).tobytes()
        self.num_documents += len(lengths)
        self.num_tokens += int(lengths.sum())
        self.num_bytes += int(num_bytes.sum())

    def close(self) -> None:
        self._out.close()
        write_index(Path(get_idx_path(str(self.prefix))), np.frombuffer(self._lengths, np.int32), self.dtype)
        np.save(f"{self.prefix}.bytes.npy", np.frombuffer(self._bytes, np.uint32), allow_pickle=False)


def write_index(file: Path, lengths: NDArray[np.int32], dtype: np.dtype[np.generic]) -> None:
    """Write the .idx file of a dataset with one sequence per document."""
    starts = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=starts[1:])
    with file.open("wb") as out:
        out.write(_HEADER + struct.pack("<QB", _VERSION, DType.code_from_dtype(dtype.type)))
        out.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
        for column in (lengths, starts * dtype.itemsize, np.arange(len(lengths) + 1, dtype=np.int64)):
            out.write(column.tobytes())


@contextmanager
def indexed_writers(*prefixes: Path, vocab_size: int) -> Iterator[tuple[IndexedWriter, ...]]:
    """Open writers, and complete their files if the context exits without an error."""
    writers = tuple(IndexedWriter(prefix, vocab_size) for prefix in prefixes)
    yield writers
    for writer in writers:
        writer.close()
