"""Where a text may be cut so that its parts have the ids that they have in the whole text.

Byte-level BPE tokenizers split a text with a regular expression first and merge inside the pieces only. With the
expressions listed here no piece holds a space after another character, so a text can be cut before a space that stands
between two visible characters. Words repeat; their ids need to be computed once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_VISIBLE = r"[\w!-~]"
CUT = re.compile(rf"(?<={_VISIBLE}) (?={_VISIBLE})")
"""The space of a cut; it belongs to the word after it."""

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
"""GPT-2; Llama 3 and Qwen 2; Mistral-NeMo and o200k."""


class Split(NamedTuple):
    """A text in parts that may be tokenized one by one."""

    first: str
    inside: list[str]
    """Each follows a space, which is left out here."""
    last: str
    """With its space; empty where the last part is one of `inside`."""
    unknown: set[str]
    """Of those inside."""


def split_at_spaces(text: str, known: Mapping[str, object]) -> Split:
    """Cut a text at all spaces if all are cuts, which most texts allow; else only where CUT says.

    Args:
        known: words from inside earlier texts; only others need a look.
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
    """As _VISIBLE has it; the empty string is not."""
    return "!" <= character <= "~" or character.isalnum()


def can_be_cut(definition: str) -> bool:
    """Whether a tokenizer gives each part between two cuts the ids that it has in the whole text.

    Args:
        definition: JSON of the `tokenizers` library. What is not known to be safe is not cut.
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
    """An added token is looked for in the whole text: it may not take spaces from beside it."""
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
