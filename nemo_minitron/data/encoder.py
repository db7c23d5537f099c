"""Texts -> token ids as bytes, as they stand in an indexed dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from nemo_minitron.data.word_cuts import CUT, can_be_cut, split_at_spaces
from nemo_minitron.errors import DataError

MOST_REMEMBERED_BYTES = 64 << 20
_BYTES_PER_ENTRY = 250
"""Of a dict, a string and the ids, beside the text itself."""
_RELEARN_CHARS = 1 << 29
"""After so much text a full memory starts anew: the words of the next files may be others."""
_LONGEST_STRETCH = 1 << 20
"""Characters of a document that are split into words at a time: a book must not take a list of all its words."""


class Encoder:
    """Token ids of whole documents, each ending in eod, as bytes of one integer type.

    Ids always come from the `tokenizers` library. Where a tokenizer allows it, the library sees each word once:
    that is several times as fast, because most words of a text are repetitions.

    Args:
        definition: JSON of the `tokenizers` library.
        vocab_size: of the model; a larger id is refused.
        dtype: name of the integer type.
        where: named when an id is refused.
    """

    def __init__(self, definition: str, *, vocab_size: int, eod_id: int, dtype: str, where: str) -> None:
        self.vocab_size, self.where = vocab_size, where
        self.dtype = np.dtype(dtype)
        self._tokenizer = open_tokenizer(definition)
        self._eod = np.array([eod_id], self.dtype).tobytes()
        self._cuts = can_be_cut(definition)
        self._words: dict[str, bytes] = {}
        """Ids of a space and the word, of words that may stand between two cuts."""
        self._edges: dict[str, bytes] = {}
        """Ids of other beginnings and ends of texts, as they stand there."""
        self._size_bytes = self._chars = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text and eod.

        Raises:
            DataError: an id beyond the model's vocabulary (tokenizer of another model).
        """
        if not self._cuts:
            return [ids + self._eod for ids in self._whole(texts)]
        stretches = [list(_stretches(text)) for text in texts]
        flat = [stretch for parts in stretches for stretch in parts]
        ids = iter(self._by_words(flat))
        return [b"".join([next(ids) for _ in parts]) + self._eod for parts in stretches]

    def _whole(self, texts: Sequence[str]) -> list[bytes]:
        if not texts:
            return []
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._to_bytes(row.ids) for row in encoded]

    def _to_bytes(self, ids: list[int]) -> bytes:
        require_known(max(ids, default=0), self.vocab_size, self.where)
        return np.array(ids, self.dtype).tobytes()

    def _by_words(self, texts: Sequence[str]) -> list[bytes]:
        """Ids without eod; what is not known yet is learned for all texts together."""
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
        if self._size_bytes < MOST_REMEMBERED_BYTES:
            new = len(new_words) + len(new_edges)
            self._size_bytes += sum(map(len, new_words)) + sum(map(len, new_edges)) + _BYTES_PER_ENTRY * new
            return
        for known, added in ((self._words, new_words), (self._edges, new_edges)):
            for text in added:
                del known[text]
        if self._chars > _RELEARN_CHARS:
            self._words.clear()
            self._edges.clear()
            self._size_bytes = self._chars = 0


def _stretches(text: str) -> Iterator[str]:
    """The text, cut into pieces of bounded length where it can be cut."""
    start = 0
    while len(text) - start > _LONGEST_STRETCH:
        cut = CUT.search(text, start + _LONGEST_STRETCH)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def open_tokenizer(definition: str) -> Any:
    """The library's tokenizer; documents are neither padded nor cut off, whatever the definition says."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def require_known(token_id: int, vocab_size: int, where: str) -> None:
    """Refuse an id that the model has no embedding for.

    Raises:
        DataError: the tokenizer is of another model.
    """
    if token_id >= vocab_size:
        raise DataError(
            f"Tokenizer mismatch: token id {token_id} is beyond the model's vocabulary of {vocab_size}.",
            where=where,
            next_step="The tokenizer is of another model: check the files beside the weights.",
        )
