"""Refusal of tokenizer.json rules that exhaust time or memory on a short text.

A chain of replacements can multiply the length of a text with each step, and a regular expression can backtrack almost
without end. The tokenizers package can be neither interrupted nor limited, so the rules are checked before it is used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.tokenizer_files import LLAMA3_PATTERN, TEKKEN_PATTERN
from nemo_minitron.limits import PATTERN_SECONDS

_MAX_GROWTH = 100.0
"""Maximum growth of a text by all rules together. Real tokenizers replace one character by one or a few."""
_MAX_RULES = 200
_SEQUENCES = ("normalizers", "pretokenizers", "decoders")
_MAX_PIECE = 1000
"""Maximum number of characters that a single rule may insert."""
_KNOWN = frozenset(
    {
        LLAMA3_PATTERN,
        LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
        TEKKEN_PATTERN,
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\s+",
        " {2,}",
        r"[0-9][0-9][0-9]",
    }
)
"""Patterns of the supported families. All others are tested in a child process."""
_PROBE = """
import json, sys
from tokenizers import Tokenizer
rules, signs = json.load(sys.stdin)
tokenizer = Tokenizer.from_str(json.dumps({
    "version": "1.0", "added_tokens": [], "post_processor": None, "decoder": None, **rules,
    "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
}))
for length in (64, 4000):
    for sign in signs:
        for end in ("", "!", "\\x00", "a", "\\n"):
            try:
                tokenizer.encode(sign * (length // len(sign)) + end)
            except BaseException as error:  # the package panics when its regular expressions give up
                sys.exit(3 if length == 64 and "retry-limit" in str(error) else 1)
"""
_GAVE_UP = 3
_SIGNS = ["a", "A", "1", " ", "\n", "\t", "'", ".", "-", "\u00e9", "\u4e16", "aA", "a ", " a", "a1", "ab", " \n"]


def require_bounded_rules(content: dict[str, Any], model_dir: Path) -> None:
    """Refuse a tokenizer.json whose rules lengthen a text too much or whose patterns backtrack too long.

    Raises:
        CheckpointError: names the rule.
    """
    for key in ("normalizer", "decoder"):
        rules = list(_rules(content.get(key)))
        growth = 1.0
        for rule in rules:
            growth *= _growth(rule)
        if growth > _MAX_GROWTH or len(rules) > _MAX_RULES:
            raise _refused(
                f"The {key} of the tokenizer has {len(rules)} rules that make a text up to {growth:.3g} times as long.",
                f"at most {_MAX_RULES} rules, and {_MAX_GROWTH:g} times the length",
                model_dir,
            )
    unknown = [pattern for pattern in _patterns(content) if pattern not in _KNOWN]
    if unknown:
        _test_patterns(content, unknown, model_dir)


def _rules(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rules of a normalizer, pre-tokenizer or decoder, including those in sequences."""
    if not isinstance(part, dict) or depth > _MAX_RULES:
        return
    inner = [rules for key in _SEQUENCES if isinstance(rules := part.get(key), list)]
    if not inner:
        yield part
    for rules in inner:
        for rule in rules:
            yield from _rules(rule, depth + 1)


def _growth(rule: dict[str, Any]) -> float:
    """Return an upper bound of the factor by which a rule lengthens a text."""
    if rule.get("type") == "Prepend":
        return 1.0 if len(str(rule.get("prepend", ""))) <= _MAX_PIECE else _MAX_GROWTH * 2
    if rule.get("type") != "Replace":
        return 1.0
    pattern, content = rule.get("pattern"), len(str(rule.get("content", "")))
    text = pattern.get("String") if isinstance(pattern, dict) else None
    # A regular expression may match single characters, or the empty string between any two.
    return max(1.0, content / len(text)) if isinstance(text, str) and text else 1.0 + content


def _patterns(content: dict[str, Any]) -> Iterator[str]:
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        for rule in _rules(content.get(key)):
            pattern = rule.get("pattern")
            if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
                yield pattern["Regex"]


def _test_patterns(content: dict[str, Any], patterns: list[str], model_dir: Path) -> None:
    """Split texts that cause excessive backtracking, in a process with a time limit."""
    rules = {key: content.get(key) for key in ("normalizer", "pre_tokenizer")}
    own = sorted({sign for pattern in patterns for sign in pattern[:2000] if sign.isalnum()})[:20]
    code = _test_result(json.dumps([rules, [*_SIGNS, *own]]), PATTERN_SECONDS.value())
    if code == _GAVE_UP:
        raise _refused(
            f"The tokenizer splits texts by a pattern that exceeds the retry limit on 64 characters: "
            f"{patterns[0][:200]!r}.",
            "patterns without excessive backtracking",
            model_dir,
        )
    if code is None:
        raise _refused(
            f"The tokenizer splits short texts by a pattern that takes more than {PATTERN_SECONDS.value()} s: "
            f"{patterns[0][:200]!r}.",
            PATTERN_SECONDS.how_to_raise(),
            model_dir,
        )


@lru_cache(maxsize=64)
def _test_result(task: str, timeout_s: int) -> int | None:
    """Run the probe, and return its exit code; None if it exceeds the time limit."""
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "text": True}
    try:
        # `-I`: import nothing from the working folder. Other failures are reported when the tokenizer is loaded.
        words = [sys.executable, "-I", "-c", _PROBE]
        return subprocess.run(words, input=task, timeout=timeout_s, check=False, **options).returncode
    except subprocess.TimeoutExpired:
        return None


def _refused(what: str, allowed: str, model_dir: Path) -> CheckpointError:
    return CheckpointError(
        what, where=str(model_dir / "tokenizer.json"), allowed=allowed, next_step="Use the tokenizer of another model."
    )
