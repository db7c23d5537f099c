"""Replacement of the tokenizer class by the generic one, with the effects of class and flags moved into the files.

transformers 4 and 5 both load the generic class from tokenizer.json alone. For some other classes (Llama's, GPT-2's,
Qwen's), transformers 5 builds a new tokenizer from the vocabulary and ignores the rules in the file, for example the
splitting of digits in SmolLM2. transformers 4 applies `add_bos_token` only to Llama's classes, and transformers 5 to
all; for `add_prefix_space` it is the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Generic class that reads everything from tokenizer.json. The name exists in transformers 4 and 5."""
_END = "<|endoftext|>"
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
}
"""Default special tokens of each class, for keys that tokenizer_config.json lacks."""
_INPUT_NAMES = ["input_ids", "attention_mask"]


def plain_config(found: Mapping[str, Any], known: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return tokenizer_config.json with the generic class and the defaults of the original class.

    Args:
        found: content of the file.
        known: special tokens from other files.
        ids: token -> id.
    """
    kind = _kind(found)
    defaults: dict[str, Any] = {key: token for key, token in _TOKENS.get(kind, {}).items() if token in ids}
    config = {**found, "tokenizer_class": PLAIN_CLASS}
    if _is_llama(kind):
        defaults["padding_side"] = "left"
    # By default the generic class of transformers 4 returns token_type_ids, which no supported model accepts.
    defaults["model_input_names"] = _INPUT_NAMES
    for key, value in {**defaults, **known}.items():
        config.setdefault(key, value)
    for key in ("add_bos_token", "add_eos_token", "backend", "is_local", "auto_map"):
        config.pop(key, None)
    return config


def apply_flags(
    found: Mapping[str, Any], config: Mapping[str, Any], content: dict[str, Any], ids: Mapping[str, int]
) -> None:
    """Apply the flags of tokenizer_config.json to the content of tokenizer.json like transformers 4, in place.

    Args:
        found: original content of tokenizer_config.json.
        config: result of `plain_config`.
        content: content of tokenizer.json.
        ids: token -> id.
    """
    # transformers 5, which writes the key `backend`, has already applied these flags to tokenizer.json.
    if _is_llama(_kind(found)) and "backend" not in found:
        wanted = {"bos_token": found.get("add_bos_token", True), "eos_token": found.get("add_eos_token", False)}
        tokens = {key: _content(config.get(key)) for key, flag in wanted.items() if flag}
        if all(token in ids for token in tokens.values()) and (tokens or content.get("post_processor")):
            content["post_processor"] = _around(tokens.get("bos_token"), tokens.get("eos_token"), ids)
    rule, is_spaced = content.get("pre_tokenizer"), found.get("add_prefix_space", False)
    if isinstance(rule, dict) and rule.get("type") == "ByteLevel" and isinstance(is_spaced, bool):
        content["pre_tokenizer"] = {**rule, "add_prefix_space": is_spaced}


def _kind(config: Mapping[str, Any]) -> str:
    name = config.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _is_llama(kind: str) -> bool:
    return _TOKENS.get(kind) is _LLAMA


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _around(bos: str | None, eos: str | None, ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the post-processor for tokenizer.json that puts bos before and eos after every text."""
    parts = [
        [
            *([] if bos is None else [{"SpecialToken": {"id": bos, "type_id": number}}]),
            {"Sequence": {"id": name, "type_id": number}},
            *([] if eos is None else [{"SpecialToken": {"id": eos, "type_id": number}}]),
        ]
        for number, name in enumerate("AB")
    ]
    special = {
        token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (bos, eos) if token is not None
    }
    return {"type": "TemplateProcessing", "single": parts[0], "pair": parts[0] + parts[1], "special_tokens": special}
