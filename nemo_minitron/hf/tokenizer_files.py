"""Repairs of tokenizer files that versions of transformers read differently.

tokenizer.json defines how a text becomes ids; `tokenizer_classes` covers the effects of classes and flags. Training
tools also leave truncation and padding enabled in tokenizer.json. `repairs` finds the changes that are needed so that
all versions produce the same token ids. Files that need no change stay byte-identical.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.hf.tokenizer_classes import apply_flags, plain_config
from nemo_minitron.limits import TOKENIZER_BYTES, too_large

TOKENIZER_FILE, CONFIG_FILE, MAP_FILE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
_BOM = b"\xef\xbb\xbf"
_SPECIAL_IDS = ("bos_token", "eos_token", "pad_token")

_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern of Mistral's tokenizers since Mistral-NeMo. Some of its models were published with Llama 3's pattern."""
MISTRAL_TYPES = ("mistral", "mistral3", "ministral", "pixtral", "voxtral")
_MISTRAL_TOKEN = "[INST]"
"""Token that all tokenizers of Mistral contain, and none of Llama 3."""


@dataclass(frozen=True)
class Repairs:
    """New contents of tokenizer files, and descriptions of the changes."""

    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    definition: dict[str, Any] = field(default_factory=dict)
    """Content of tokenizer.json; empty if there is none."""

    def write(self, folder: Path) -> None:
        """Write the changed files into a folder."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")


def repairs(folder: Path) -> Repairs:
    """Find the changes that the tokenizer files of a folder need.

    Raises:
        CheckpointError: a file is not a JSON object.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        return Repairs()
    content = read_object(folder / TOKENIZER_FILE)
    out = Repairs(definition=content)
    before = _rules(content)
    _repair_config(folder, content, out)
    for name in (MAP_FILE, ADDED_FILE):
        if _has_bom(folder / name):
            out.files[name] = _text(read_object(folder / name))
    out.notes.extend(_repair_tokenizer(content, _read_leniently(folder / "config.json").get("model_type")))
    if _rules(content) != before or _has_bom(folder / TOKENIZER_FILE):
        out.files[TOKENIZER_FILE] = _text(content)
    return out


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object, and skip a byte order mark.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    try:
        if reason := too_large(file, TOKENIZER_BYTES):
            raise ValueError(reason)
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, shortened(error)) from error
    if not isinstance(content, dict):
        raise _damaged(file, "it is not a JSON object")
    return content


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer cannot be read: {file.name} is damaged: {why}",
        where=str(file),
        next_step="Download or copy the file again, and compare its size with that of the source.",
    )


def _rules(content: dict[str, Any]) -> str:
    """Return the parts of a tokenizer.json that repairs can change, as text."""
    return json.dumps([content.get(key) for key in ("truncation", "padding", "pre_tokenizer", "post_processor")])


def _repair_tokenizer(content: dict[str, Any], model_type: Any) -> list[str]:
    """Repair the content of tokenizer.json in place, and return descriptions of the changes."""
    notes = []
    for key in ("truncation", "padding"):
        if content.get(key) is not None:
            content[key] = None
            notes.append(f"{TOKENIZER_FILE} was saved with {key} enabled; it has been disabled")
    if model_type in MISTRAL_TYPES and _MISTRAL_TOKEN in _added_contents(content):
        split = _first_split(content.get("pre_tokenizer"))
        if split is not None and split["pattern"].get("Regex") == LLAMA3_PATTERN:
            split["pattern"] = {"Regex": TEKKEN_PATTERN}
            notes.append(f"{TOKENIZER_FILE} had the pattern of Llama 3; it has been replaced with Mistral's pattern")
    return notes


def _added_contents(content: dict[str, Any]) -> set[str]:
    return {str(token["content"]) for token in added_tokens(content)}


def added_tokens(content: dict[str, Any]) -> list[dict[str, Any]]:
    """List the added tokens of a tokenizer.json: dictionaries with at least `id` and `content`."""
    listed = content.get("added_tokens")
    tokens = listed if isinstance(listed, list) else []
    return [token for token in tokens if isinstance(token, dict) and {"id", "content"} <= token.keys()]


def _first_split(pre_tokenizer: Any) -> dict[str, Any] | None:
    """Return the first rule of a pre-tokenizer if it splits by a pattern, or None."""
    if not isinstance(pre_tokenizer, dict):
        return None
    rules = pre_tokenizer.get("pretokenizers")
    first = rules[0] if isinstance(rules, list) and rules else pre_tokenizer
    return first if isinstance(first, dict) and isinstance(first.get("pattern"), dict) else None


def _repair_config(folder: Path, content: dict[str, Any], out: Repairs) -> None:
    """Repair tokenizer_config.json for transformers 4 and 5, or create it from the other files if it is missing."""
    file = folder / CONFIG_FILE
    found = read_object(file) if file.is_file() else {}
    names = token_names(content)
    ids = {token: number for number, token in names.items()}
    name = found.get("tokenizer_class")
    config = plain_config(found, _special_tokens(folder, names, has_class=isinstance(name, str)), ids)
    before = _rules(content)
    apply_flags(found, config, content, ids)
    if _rules(content) != before:
        out.notes.append(f"flags of {CONFIG_FILE}, which transformers 5 ignores, have been applied to {TOKENIZER_FILE}")
    length = config.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | float)):
        del config["model_max_length"]  # transformers compares it with the length of a text
    if isinstance(config.get("extra_special_tokens"), list):
        special = [*_listed(config.get("additional_special_tokens")), *config.pop("extra_special_tokens")]
        # Remove duplicates: a duplicate token would be added twice.
        config["additional_special_tokens"] = list({_content(token): token for token in special}.values())
    if config != found or _has_bom(file):
        out.files[CONFIG_FILE] = _text(config)
    # A change of model_input_names alone does not affect token ids and is not reported.
    if found and config != {"model_input_names": config["model_input_names"], **found}:
        out.notes.append(f"{CONFIG_FILE} ({name}) has been rewritten so that transformers 4 and 5 can both read it")


def _special_tokens(folder: Path, names: Mapping[int, str], *, has_class: bool) -> dict[str, Any]:
    """Return the special tokens from special_tokens_map.json or, without it and without a class, from config.json."""
    if (folder / MAP_FILE).is_file():
        found = read_object(folder / MAP_FILE)
        return {key: token for key, token in found.items() if key.endswith(("_token", "_tokens"))}
    if has_class:
        return {}
    config = _read_leniently(folder / "config.json")
    ids = {key: config.get(f"{key}_id") for key in _SPECIAL_IDS}
    ids = {key: number[0] if isinstance(number, list) and number else number for key, number in ids.items()}
    return {key: names[number] for key, number in ids.items() if isinstance(number, int) and number in names}


def token_names(content: dict[str, Any]) -> dict[int, str]:
    """Return token id -> token of a tokenizer.json."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    names: dict[int, str] = {}
    if isinstance(vocab, dict):
        names = {number: token for token, number in vocab.items() if isinstance(number, int)}
    elif isinstance(vocab, list):
        names = {number: str(piece[0]) for number, piece in enumerate(vocab) if isinstance(piece, list) and piece}
    added = {token["id"]: str(token["content"]) for token in added_tokens(content) if isinstance(token["id"], int)}
    return names | added


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _read_leniently(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged."""
    try:
        return read_object(file)
    except CheckpointError:
        return {}


def _has_bom(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_BOM)) == _BOM


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
