"""Conversion of the tokenizer in a GGUF file to tokenizer.json and the other tokenizer files.

It is rebuilt from the keys of the file, because transformers' GGUF reader confuses bos with eos, adds a bos token even
where the file disables it, and uses one pre-tokenizer for all models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.hf.gguf_header import FROM_FOLDER
from nemo_minitron.hf.tokenizer_files import LLAMA3_PATTERN, TEKKEN_PATTERN
from nemo_minitron.hf.tokenizer_writer import write_tokenizer

_TEMPLATE = "tokenizer.chat_template"
_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token types: special tokens, and user-defined tokens that are never split."""

_PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": TEKKEN_PATTERN,
}
"""Pre-tokenizer name in GGUF (tokenizer.ggml.pre) -> pattern that splits text before BPE."""
_GPT2 = ("gpt-2", "smollm")
_UNKNOWN = "default"
"""What llama.cpp takes a file for whose converter did not name the pre-tokenizer: no model's own one."""
_SPACE = "\u2581"
_WHOLE_TOKENS_FIRST = ("llama-bpe", "tekken")
"""Pre-tokenizer names for which a word that is in the vocabulary becomes one token without merging."""


def save_tokenizer(fields: Mapping[str, Any], file: Path, out_dir: Path) -> None:
    """Write the tokenizer and chat templates into `out_dir`.

    Args:
        fields: keys of the GGUF file.

    Raises:
        CheckpointError: the file has no tokenizer, or its type or pre-tokenizer is not supported.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind is None:
        raise CheckpointError("The GGUF file has no tokenizer.", where=str(file), next_step=FROM_FOLDER)
    if kind not in _BUILDERS:
        raise CheckpointError(
            f"The GGUF file's tokenizer ({kind}) is not supported.", where=str(file), allowed=", ".join(_BUILDERS)
        )
    try:
        tokenizer, special = _BUILDERS[kind](fields, file), _special_tokens(fields)
        _add_special(tokenizer, fields, special.get("bos_token"))
        length = fields.get(f"{fields['general.architecture']}.context_length")
        write_tokenizer(
            out_dir,
            tokenizer,
            special,
            chat_template=_chat_templates(fields),
            max_length=length if isinstance(length, int) else None,
        )
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(
            f"The GGUF file's tokenizer is damaged: {shortened(repr(error))}", where=str(file)
        ) from error


def _chat_templates(fields: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or name -> template if the file contains several."""
    default = fields.get(_TEMPLATE)
    others = fields.get("tokenizer.chat_templates") or []
    named = {name: fields[f"{_TEMPLATE}.{name}"] for name in others if f"{_TEMPLATE}.{name}" in fields}
    if not named:
        return default
    return {**named, **({} if default is None else {"default": default})}


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return transformers name -> token of the special tokens."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _byte_level_bpe(fields: Mapping[str, Any], file: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    rule = str(fields.get("tokenizer.ggml.pre", _UNKNOWN))
    if rule == _UNKNOWN:
        raise CheckpointError(
            "The GGUF file does not say how its tokenizer splits text (tokenizer.ggml.pre).",
            where=str(file),
            next_step="Convert the model again with a current llama.cpp, or import its Hugging Face folder.",
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    if len(vocab) < len(fields["tokenizer.ggml.tokens"]):
        raise ValueError("a token occurs twice")
    model = models.BPE(vocab, merges, ignore_merges=rule in _WHOLE_TOKENS_FIRST)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(rule, file)
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _pre_tokenizer(rule: str, file: Path) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if rule in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[rule]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if rule not in _GPT2:
        raise CheckpointError(
            f"The tokenizer's pre-tokenizer {rule!r} is not supported.",
            where=str(file),
            allowed=", ".join([*_PATTERNS, *_GPT2]),
            next_step=FROM_FOLDER,
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _sentencepiece(fields: Mapping[str, Any], file: Path) -> Any:
    """Build a SentencePiece BPE tokenizer like Llama 2's own tokenizer.json; special tokens are added afterwards."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = fields["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    if len(scores) < len(tokens):
        raise ValueError("a token occurs twice")
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    vocab = {token: number for number, token in enumerate(tokens)}
    options = {"unk_token": None if unknown is None else tokens[unknown], "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab, _merges(scores), **options))
    is_spaced = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    start = [normalizers.Prepend(_SPACE)] if is_spaced else []
    tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if is_spaced else []
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List all pairs of tokens that form a token, sorted by the score of the token, then by the scores of its parts."""
    out: list[tuple[float, str, str]] = []
    for token, score in scores.items():
        cuts = [(token[:place], token[place:]) for place in range(1, len(token))]
        parts = [(first, second) for first, second in cuts if first in scores and second in scores]
        parts.sort(key=lambda pair: (scores[pair[0]], scores[pair[1]]), reverse=True)
        out += [(score, first, second) for first, second in parts]
    return [(first, second) for _, first, second in sorted(out, key=lambda merge: merge[0], reverse=True)]


_BUILDERS: dict[str, Callable[[Mapping[str, Any], Path], Any]] = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
"""Tokenizer type (tokenizer.ggml.model) -> builder."""


def _add_special(tokenizer: Any, fields: Mapping[str, Any], bos: str | None) -> None:
    from tokenizers import AddedToken, processors

    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", [])
    of_type = {kind: [tokens[i] for i, t in enumerate(types) if t == kind] for kind in (_CONTROL, _USER_DEFINED)}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of_type[_CONTROL]])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in of_type[_USER_DEFINED]])
    # Without the key add_bos_token, these tokenizer types put bos first.
    begins = fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") in _WHOLE_TOKENS_FIRST
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", begins):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    elif fields["tokenizer.ggml.model"] == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
