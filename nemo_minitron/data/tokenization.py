"""Tokenizing documents with the teacher's tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.data.encoder import Encoder, require_known
from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.tokenizer import load_tokenizer

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
"""End-of-document tokens of base models. Chat models keep them in the vocabulary, but have another eos token."""


@dataclass(frozen=True)
class DocumentTokenizer:
    """Tokenizer bound to a model's vocabulary."""

    definition: str
    """JSON of the `tokenizers` library; it is sent to the worker processes."""
    vocab_size: int
    """Vocabulary size of the model; the tokenizer may have fewer tokens, but not more."""
    eod_id: int

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int) -> DocumentTokenizer:
        """Load the tokenizer of a Hugging Face folder.

        Documents end in `<|endoftext|>` or `<|end_of_text|>` if the vocabulary has it, otherwise in the eos token.

        Raises:
            CheckpointError: there is no readable tokenizer.
            DataError: its end-of-document token is beyond the model's vocabulary.
        """
        tokenizer = load_tokenizer(model_dir)
        backend = tokenizer.backend_tokenizer
        known = [backend.token_to_id(token) for token in EOD_TOKENS]
        eod_id = next((number for number in known if number is not None), tokenizer.eos_token_id)
        if eod_id is None:
            raise CheckpointError("The tokenizer has no end-of-text token.", where=str(model_dir))
        require_known(int(eod_id), vocab_size, str(model_dir))
        return cls(backend.to_str(), vocab_size, int(eod_id))

    def encoder(self, dtype: str, where: str) -> Encoder:
        """Create an encoder for this tokenizer.

        Args:
            dtype: name of the integer type of the ids.
            where: place for the error message if the tokenizer belongs to another model.
        """
        return Encoder(self.definition, vocab_size=self.vocab_size, eod_id=self.eod_id, dtype=dtype, where=where)


def is_heldout(seed: int, source: int, document: int, fraction: float) -> bool:
    """Return whether a document belongs to the validation split; it depends only on the arguments, not on the text."""
    digest = hashlib.blake2b(f"{seed}:{source}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
