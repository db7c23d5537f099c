"""Places where a text can be cut so that its parts, tokenized separately, give the token ids of the whole text.

Byte-level BPE tokenizers first split a text with a regular expression, then merge only inside the pieces. With the
expressions listed here, a space can only be the first character of a piece, so a text can be cut before any space
between two visible characters. Words repeat, so the ids of each word need to be computed only once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_VISIBLE = r"[\w!-~]"
CUT = re.compile(rf"(?<={_VISIBLE}) (?={_VISIBLE})")
"""Matches the space at a cut; the space belongs to the word after it."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN_EXPRESSIONS = frozenset(
    [_GPT2]
    + [rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}|{_TAIL}" for numbers in (r"\p{N}{1,3}", r"\p{N}")]
    + [_CASED % ("", "", r"\p{N}"), _CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?", r"\p{N}{1,3}")]
)
"""Pre-tokenizer expressions of GPT-2; Llama 3 and Qwen 2; Mistral-NeMo and o200k."""


class Split(NamedTuple):
    """A text split into parts that can be tokenized separately."""

    first: str
    inside: list[str]
    """Middle parts; the space before each is left out."""
    last: str
    """Last part with the space before it; empty if the last part is in `inside`."""
    unknown: set[str]
    """Words of `inside` that were not known."""


def split_at_spaces(text: str, known: Mapping[str, object]) -> Split:
    """Cut a text at every space if each is a valid cut, as in most texts; otherwise only where CUT matches.

    Args:
        known: words inside earlier texts, which need no check.
    """
    first, *inside = text.split(" ")
    if not inside:
        return Split(first, inside, "", set())
    last = ""
    if inside[-1] not in known and not _is_plain(inside[-1]):
        last = f" {inside.pop()}"
    unknown = set(inside).difference(known)
    starts_well = _is_visible(first[-1:]) and (not last or _is_visible(last[1:2]))
    if not starts_well or not all(map(_is_plain, unknown)):
        first, *inside = CUT.split(text)
        last = f" {inside.pop()}" if inside else ""
        unknown = set(inside).difference(known)
    return Split(first, inside, last, unknown)


def _is_plain(word: str) -> bool:
    return _is_visible(word[:1]) and _is_visible(word[-1:])


def _is_visible(character: str) -> bool:
    """Return whether the character matches _VISIBLE; the empty string does not."""
    return "!" <= character <= "~" or character.isalnum()


def can_be_cut(definition: str) -> bool:
    """Return whether each part between two cuts gets the same ids from this tokenizer as in the whole text.

    Args:
        definition: JSON of the `tokenizers` library. Returns False for settings that are not known to be safe.
    """
    facts = json.loads(definition)
    return (
        _is_plain_bpe(facts["model"])
        and (facts.get("normalizer") is None or facts["normalizer"] == {"type": "NFC"})
        and _splits_before_spaces(facts.get("pre_tokenizer"))
        and all(_is_plain_token(token) for token in facts.get("added_tokens") or [])
    )


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    )


def _is_plain_token(token: Mapping[str, Any]) -> bool:
    """Return whether an added token, which is matched in the whole text, includes no spaces around or inside it."""
    takes_more = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    return not takes_more and not re.search(r"\s", token["content"])


def _splits_before_spaces(step: Mapping[str, Any] | None) -> bool:
    if step is None:
        return False
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    *splits, last = steps or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return False
    by_words = [_is_known_split(split) for split in splits if split["type"] != "Digits"]
    return all(by_words) and (bool(by_words) or last.get("use_regex", True))


def _is_known_split(step: Mapping[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["behavior"] == "Isolated"
        and not step["invert"]
        and step["pattern"].get("Regex") in KNOWN_EXPRESSIONS
    )
