"""Comparison of tokenizers: whether they produce the same ids for the same text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.tokenizer_files import TOKENIZER_FILE, added_tokens, read_object

_WITHOUT_DEFINITION = ("tokenizer.model", "vocab.json")
_TOKEN_RULES = ("lstrip", "rstrip", "single_word", "normalized")
"""Flags of an added token that determine where it matches in a text."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """sha256 of each part of a tokenizer that determines the ids of a text; empty: unknown."""

    vocab: str
    """Tokens and ids of the model; the only part in manifests of older versions."""
    merges: str = ""
    """Model type and merges."""
    rules: str = ""
    """Normalizer and pre-tokenizer."""
    added: str = ""
    """Added tokens. They may differ as long as they do not occur in a text."""

    @classmethod
    def of(cls, model_dir: Path) -> TokenizerIdentity:
        """Compute the identity of the tokenizer in a folder.

        Raises:
            CheckpointError: there is no tokenizer, or it cannot be read.
        """
        file = model_dir / TOKENIZER_FILE
        if not file.is_file():
            return cls(_other_file(model_dir))
        content = read_object(file)
        model = content.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise CheckpointError(f"The tokenizer cannot be read: {file.name} has no vocabulary.", where=str(file))
        # Older files store a merge as "a b", newer ones as ["a", "b"].
        merges = [part if isinstance(part, str) else " ".join(map(str, part)) for part in model.get("merges") or ()]
        return cls(
            _digest(model["vocab"]),
            _digest([model.get("type"), merges]),
            _digest([content.get("normalizer"), content.get("pre_tokenizer")]),
            _digest(sorted(_added(content).items())),
        )

    @classmethod
    def parse(cls, text: str) -> TokenizerIdentity:
        """Parse the output of `str`. Manifests of older versions contain only the first part."""
        return cls(*text.split("-")[:4])

    def __str__(self) -> str:
        return "-".join(part for part in (self.vocab, self.merges, self.rules, self.added) if part)

    def differences(self, other: TokenizerIdentity) -> list[str]:
        """List the names of the parts that are known for both tokenizers and differ."""
        parts = {name: (getattr(self, name), getattr(other, name)) for name in ("vocab", "merges", "rules", "added")}
        return [name for name, (mine, theirs) in parts.items() if mine and theirs and mine != theirs]


def has_tokenizer(model_dir: Path) -> bool:
    """Return whether a folder has a tokenizer that can be compared."""
    return any((model_dir / name).is_file() for name in (TOKENIZER_FILE, *_WITHOUT_DEFINITION))


def tokenizer_fingerprint(model_dir: Path) -> str:
    """Return the identity of a folder's tokenizer as text, for manifests.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    return str(TokenizerIdentity.of(model_dir))


def differing_added_tokens(one: Path, other: Path) -> dict[int, tuple[str | None, str | None]]:
    """Return id -> added token in each of two folders, where they differ; None: no added token has this id."""
    mine, theirs = (_added(_content(folder)) for folder in (one, other))
    return {
        number: (_name(mine.get(number)), _name(theirs.get(number)))
        for number in sorted(mine.keys() | theirs.keys())
        if mine.get(number) != theirs.get(number)
    }


def _content(folder: Path) -> dict[str, Any]:
    file = folder / TOKENIZER_FILE
    return read_object(file) if file.is_file() else {}


def _added(content: Mapping[str, Any]) -> dict[int, list[Any]]:
    return {
        int(token["id"]): [str(token["content"]), *(bool(token.get(rule)) for rule in _TOKEN_RULES)]
        for token in added_tokens(dict(content))
    }


def _name(token: list[Any] | None) -> str | None:
    return None if token is None else str(token[0])


def _other_file(model_dir: Path) -> str:
    for name in _WITHOUT_DEFINITION:
        if (model_dir / name).is_file():
            return hashlib.sha256((model_dir / name).read_bytes()).hexdigest()
    raise CheckpointError("The model folder has no tokenizer.", where=str(model_dir))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
