"""Texts -> token ids as bytes, as they stand in an indexed dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from nemo_minitron.data.word_cuts import CUT, can_be_cut, split_at_spaces
from nemo_minitron.errors import DataError

MOST_REMEMBERED_BYTES = 96 << 20
_BYTES_PER_ENTRY = 400
"""Of two dicts, two strings and the ids, beside the text itself."""
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
        self._parts: dict[str, bytes] = {}
        """Ids of what stands between two cuts, as it stands in a text."""
        self._words: dict[str, bytes] = {}
        """The same for what stands between two spaces at which a text may be cut, without the first space."""
        self._size = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text and eod.

        Raises:
            DataError: an id beyond the model's vocabulary (tokenizer of another model).
        """
        if not self._cuts:
            return [ids + self._eod for ids in self._whole(texts)]
        if self._size > MOST_REMEMBERED_BYTES:
            self._forget()
        stretches = [list(_stretches(text)) for text in texts]
        flat = [stretch for parts in stretches for stretch in parts]
        ids = iter(self._by_words(flat))
        return [b"".join([next(ids) for _ in parts]) + self._eod for parts in stretches]

    def _whole(self, texts: Sequence[str]) -> list[bytes]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._to_bytes(row.ids) for row in encoded]

    def _to_bytes(self, ids: list[int]) -> bytes:
        require_known(max(ids, default=0), self.vocab_size, self.where)
        return np.array(ids, self.dtype).tobytes()

    def _by_words(self, texts: Sequence[str]) -> list[bytes]:
        """Ids without eod; what is not known yet is learned for all texts together."""
        splits = [split_at_spaces(text, self._words) for text in texts]
        inside = {word for split in splits for word in split.unknown}
        self._learn([f" {word}" for word in inside])
        self._words.update((word, self._parts[f" {word}"]) for word in inside)
        self._learn({part for split in splits for part in (split.first, split.last)} - self._parts.keys())
        parts, words = self._parts, self._words
        return [
            b"".join([parts[split.first], *map(words.__getitem__, split.inside), parts[split.last]]) for split in splits
        ]

    def _learn(self, unknown: Collection[str]) -> None:
        for part, ids in zip(unknown, self._whole(list(unknown)) if unknown else [], strict=True):
            self._parts[part] = ids
            self._size += len(part) + len(ids) + _BYTES_PER_ENTRY

    def _forget(self) -> None:
        self._parts.clear()
        self._words.clear()
        self._size = 0


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
