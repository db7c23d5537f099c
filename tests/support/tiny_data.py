"""A small dataset artifact of random token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.data.indexed import IndexedWriter


def add_document(writer: IndexedWriter, ids: NDArray[np.integer], num_bytes: int) -> None:
    """Add one document, whose ids end in eod."""
    writer.add_run(memoryview(ids.astype(writer.dtype).tobytes()), np.array([len(ids)]), np.array([num_bytes]))


def tiny_data_dir(folder: Path, *, vocab_size: int = 512, num_documents: int = 40, seed: int = 0) -> Path:
    """Write indexed train and valid splits, with the files that the tokenize stage writes."""
    from nemo_minitron.backends.megatron.data.indexed import indexed_writers

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with indexed_writers(folder / "train_00", folder / "valid_00", vocab_size=vocab_size) as (train, valid):
        for number in range(num_documents):
            ids = generator.integers(1, vocab_size, size=int(generator.integers(20, 90)))
            add_document(valid if number % 4 == 0 else train, np.append(ids, 0), 3 * len(ids))
    splits = {
        writer.prefix.name.split("_")[0]: [
            {"prefix": writer.prefix.name, "source": "tiny", "weight": 1.0, "num_tokens": writer.num_tokens}
        ]
        for writer in (train, valid)
    }
    (folder / "data.json").write_text(json.dumps({"vocab_size": vocab_size, "eod_id": 0, **splits}))
    return folder
