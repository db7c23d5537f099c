"""Encoding texts as token ids, in the byte format of an indexed dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from nemo_minitron.data.word_cuts import CUT, can_be_cut, split_at_spaces
from nemo_minitron.errors import DataError

MAX_CACHE_BYTES = 64 << 20
_BYTES_PER_ENTRY = 250
"""Memory of a cache entry (dict slot, string object and ids) without its characters."""
_CACHE_RESET_CHARS = 1 << 29
"""A full cache is cleared after this much text, because later files may use other words."""
_MAX_CHUNK_CHARS = 1 << 20
"""Largest part of a document split into words at a time, so that a book needs no list of all its words."""


class Encoder:
    """Encodes whole documents as token ids that end in eod, as bytes of one integer type.

    Ids always come from the `tokenizers` library. If the tokenizer allows it, each distinct word is tokenized only
    once, which is several times as fast, because most words of a text are repetitions.

    Args:
        definition: JSON of the `tokenizers` library.
        vocab_size: of the model; ids beyond it are refused.
        dtype: name of the integer type.
        where: place for the error message when an id is refused.
    """

    def __init__(self, definition: str, *, vocab_size: int, eod_id: int, dtype: str, where: str) -> None:
        self.vocab_size, self.where = vocab_size, where
        self.dtype = np.dtype(dtype)
        self._tokenizer = open_tokenizer(definition)
        self._eod = np.array([eod_id], self.dtype).tobytes()
        self._cuts = can_be_cut(definition)
        self._words: dict[str, bytes] = {}
        """Ids of each word between two cuts, including the space before it."""
        self._edges: dict[str, bytes] = {}
        """Ids of the first and last parts of texts, without an added space."""
        self._size_bytes = self._chars = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text followed by eod.

        Raises:
            DataError: an id is beyond the model's vocabulary, so the tokenizer belongs to another model.
        """
        if not self._cuts:
            return [ids + self._eod for ids in self._whole(texts)]
        chunks = [list(_chunks(text)) for text in texts]
        flat = [chunk for parts in chunks for chunk in parts]
        ids = iter(self._by_words(flat))
        return [b"".join([next(ids) for _ in parts]) + self._eod for parts in chunks]

    def _whole(self, texts: Sequence[str]) -> list[bytes]:
        if not texts:
            return []
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._to_bytes(row.ids) for row in encoded]

    def _to_bytes(self, ids: list[int]) -> bytes:
        require_known(max(ids, default=0), self.vocab_size, self.where)
        return np.array(ids, self.dtype).tobytes()

    def _by_words(self, texts: Sequence[str]) -> list[bytes]:
        """Return ids without eod; tokenize the new words of all texts in one batch."""
        splits = [split_at_spaces(text, self._words) for text in texts]
        new_words = {word for split in splits for word in split.unknown}
        new_edges = {edge for split in splits for edge in (split.first, split.last) if edge not in self._edges}
        words, edges = self._words, self._edges
        words.update(zip(new_words, self._whole([f" {word}" for word in new_words]), strict=True))
        edges.update(zip(new_edges, self._whole(list(new_edges)), strict=True))
        found = [
            b"".join([edges[split.first], *map(words.__getitem__, split.inside), edges[split.last]]) for split in splits
        ]
        self._bound_memory(new_words, new_edges, sum(map(len, texts)))
        return found

    def _bound_memory(self, new_words: Collection[str], new_edges: Collection[str], chars: int) -> None:
        self._chars += chars
        if self._size_bytes < MAX_CACHE_BYTES:
            new = len(new_words) + len(new_edges)
            self._size_bytes += sum(map(len, new_words)) + sum(map(len, new_edges)) + _BYTES_PER_ENTRY * new
            return
        for known, added in ((self._words, new_words), (self._edges, new_edges)):
            for text in added:
                del known[text]
        if self._chars > _CACHE_RESET_CHARS:
            self._words.clear()
            self._edges.clear()
            self._size_bytes = self._chars = 0


def _chunks(text: str) -> Iterator[str]:
    """Cut a text into pieces of about _MAX_CHUNK_CHARS characters, as far as it can be cut."""
    start = 0
    while len(text) - start > _MAX_CHUNK_CHARS:
        cut = CUT.search(text, start + _MAX_CHUNK_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def open_tokenizer(definition: str) -> Any:
    """Create the library's tokenizer with padding and truncation disabled, regardless of the definition."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def require_known(token_id: int, vocab_size: int, where: str) -> None:
    """Refuse a token id for which the model has no embedding.

    Raises:
        DataError: the tokenizer belongs to another model.
    """
    if token_id >= vocab_size:
        raise DataError(
            f"Tokenizer mismatch: token id {token_id} is beyond the model's vocabulary of {vocab_size}.",
            where=where,
            next_step="The tokenizer belongs to another model: check the tokenizer files in the model's folder.",
        )
