"""Classes and flags of tokenizer_config.json -> the plain class, with what they meant in the files themselves.

Both versions of transformers take the plain class by tokenizer.json alone. Of other classes transformers 5 builds some
anew from the vocabulary (Llama's, GPT-2's, Qwen's), without the file's own rules: SmolLM2's digits would stay together.
transformers 4 heeds `add_bos_token` for Llama's classes only, transformers 5 for every class; `add_prefix_space` the
other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Takes everything from tokenizer.json; versions 4 and 5 of transformers know the name."""
_END = "<|endoftext|>"
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
}
"""Special tokens that a class has where tokenizer_config.json lacks their keys."""
_INPUT_NAMES = ["input_ids", "attention_mask"]


def plain_config(found: Mapping[str, Any], known: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer_config.json with the plain class, and with what the class in it has by default.

    Args:
        found: the file's content.
        known: special tokens that other files name.
        ids: token -> id.
    """
    kind = _kind(found)
    defaults: dict[str, Any] = {key: token for key, token in _TOKENS.get(kind, {}).items() if token in ids}
    config = {**found, "tokenizer_class": PLAIN_CLASS}
    if _is_llama(kind):
        defaults["padding_side"] = "left"
    # Without it, the plain class of transformers 4 makes token_type_ids, which no supported model takes.
    defaults["model_input_names"] = _INPUT_NAMES
    for key, value in {**defaults, **known}.items():
        config.setdefault(key, value)
    for key in ("add_bos_token", "add_eos_token", "backend", "is_local", "auto_map"):
        config.pop(key, None)
    return config


def apply_flags(
    found: Mapping[str, Any], config: Mapping[str, Any], content: dict[str, Any], ids: Mapping[str, int]
) -> None:
    """Change `content`, that of tokenizer.json, as transformers 4 would by the flags of tokenizer_config.json.

    Args:
        found: tokenizer_config.json as it is.
        config: as `plain_config` makes it.
        ids: token -> id.
    """
    # What transformers 5 saves, with the key `backend`, stands in tokenizer.json already.
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
    """The post-processor of tokenizer.json that puts these tokens around every text."""
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
