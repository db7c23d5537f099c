"""Documents -> token ids, with the teacher's tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.errors import CheckpointError, DataError

BATCH_DOCUMENTS = 512
"""Documents given to the tokenizer at a time; it works on them with all its threads."""


@dataclass(frozen=True)
class Document:
    """One tokenized document."""

    ids: NDArray[np.int64]
    """Token ids, ending in eod."""
    num_bytes: int
    """UTF-8 size of the text."""


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer bound to a model's vocabulary."""

    tokenizer: Any
    vocab_size: int
    """Of the model; the tokenizer may know fewer tokens, never more."""
    eod_id: int

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int) -> DocumentTokenizer:
        """The tokenizer of a Hugging Face folder.

        Documents end in `<|endoftext|>` when the vocabulary has it, else in the eos token.

        Raises:
            CheckpointError: there is no readable tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model_dir), use_fast=True, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The tokenizer cannot be loaded: {error}",
                where=str(model_dir),
                next_step="The model folder needs tokenizer.json and tokenizer_config.json.",
            ) from error
        eod_id = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
        if eod_id is None:
            raise CheckpointError("The tokenizer has no end-of-text token.", where=str(model_dir))
        return cls(tokenizer, vocab_size, int(eod_id))

    def documents(self, texts: Iterable[str], *, where: str) -> Iterator[Document]:
        """Tokenize in order.

        Raises:
            DataError: an id beyond the model's vocabulary (tokenizer of another model).
        """
        iterator = iter(texts)
        while batch := list(islice(iterator, BATCH_DOCUMENTS)):
            for text, ids in zip(batch, self._ids(batch), strict=True):
                if max(ids, default=0) >= self.vocab_size:
                    raise DataError(
                        f"Token id {max(ids)} is beyond the model's vocabulary of {self.vocab_size}.",
                        where=where,
                        next_step="The tokenizer is of another model: check the files beside the weights.",
                    )
                yield Document(np.array([*ids, self.eod_id], dtype=np.int64), len(text.encode("utf-8")))

    def _ids(self, batch: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return encoded["input_ids"]


def is_heldout(seed: int, source: int, document: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split; depends on nothing but its number."""
    digest = hashlib.blake2b(f"{seed}:{source}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def tokenizer_fingerprint(model_dir: Path) -> str:
    """sha256 of the vocabulary and merges: equal for the teacher and what was cut from it."""
    file = model_dir / "tokenizer.json"
    if file.is_file():
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
    for name in ("tokenizer.model", "vocab.json"):
        if (model_dir / name).is_file():
            return hashlib.sha256((model_dir / name).read_bytes()).hexdigest()
    raise CheckpointError("There is no tokenizer beside the model.", where=str(model_dir))
