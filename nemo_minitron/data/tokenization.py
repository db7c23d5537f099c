"""Documents -> token ids, with the teacher's tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.data.encoder import Encoder, require_known
from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.tokenizer import load_tokenizer

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
"""What base models were trained to see between documents. Chat models keep it, but have another eos."""


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer bound to a model's vocabulary."""

    definition: str
    """JSON of the `tokenizers` library; goes to the worker processes."""
    vocab_size: int
    """Of the model; the tokenizer may know fewer tokens, never more."""
    eod_id: int

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int) -> DocumentTokenizer:
        """The tokenizer of a Hugging Face folder.

        Documents end in `<|endoftext|>` or `<|end_of_text|>` when the vocabulary has it, else in the eos token.

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
        """What turns texts into ids.

        Args:
            dtype: name of the integer type of the ids.
            where: named when the tokenizer turns out to be of another model.
        """
        return Encoder(self.definition, vocab_size=self.vocab_size, eod_id=self.eod_id, dtype=dtype, where=where)


def is_heldout(seed: int, source: int, document: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split; depends on nothing but its number."""
    digest = hashlib.blake2b(f"{seed}:{source}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
