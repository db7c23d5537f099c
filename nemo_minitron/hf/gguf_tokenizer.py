"""The tokenizer inside a GGUF file -> tokenizer.json and its companions.

Byte-level BPE is rebuilt from the file's own keys: transformers' reader mistakes bos for eos, adds a bos that
the file says not to add, and splits text by one rule whatever the file asks for.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.hf.gguf_header import FROM_FOLDER
from nemo_minitron.hf.tokenizer_files import LLAMA3_PATTERN, TEKKEN_PATTERN

_TEMPLATE = "tokenizer.chat_template"
_NAME_OF_TEMPLATE = re.compile(r"\w[\w.-]{0,63}")
_CONTROL, _USER_DEFINED = 3, 4
"""Token types of GGUF: special tokens, and text that is never split."""

_PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": TEKKEN_PATTERN,
}
"""How a model splits text before BPE, by the name that GGUF gives it (tokenizer.ggml.pre)."""
_GPT2 = ("default", "gpt-2", "smollm")
_WHOLE_TOKENS_FIRST = ("llama-bpe", "tekken")
"""A word that is a token is taken as it is, without merging."""


def save_tokenizer(fields: Mapping[str, Any], file: Path, out_dir: Path) -> None:
    """Write the tokenizer and chat template into `out_dir`.

    Args:
        fields: keys of the GGUF file.

    Raises:
        CheckpointError: there is none, or it splits text in a way that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

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
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            model_max_length=fields.get(f"{fields['general.architecture']}.context_length"),
            **special,
        )
        fast.chat_template = _chat_templates(fields)
        fast.save_pretrained(out_dir)
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(
            f"The GGUF file's tokenizer is damaged: {shortened(repr(error))}", where=str(file)
        ) from error


def _chat_templates(fields: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or name -> template where the file holds several.

    Raises:
        ValueError: a name that is more than a name; each becomes that of a file, and before transformers 5.10 the name
            is not looked at (CVE-2026-9856).
    """
    default = fields.get(_TEMPLATE)
    others = fields.get("tokenizer.chat_templates") or []
    for name in others:
        if not _NAME_OF_TEMPLATE.fullmatch(str(name)):
            raise ValueError(f"a chat template is called {shortened(repr(name), 80)}")
    named = {name: fields[f"{_TEMPLATE}.{name}"] for name in others if f"{_TEMPLATE}.{name}" in fields}
    if not named:
        return default
    return {**named, **({} if default is None else {"default": default})}


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """transformers' name -> token."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _byte_level_bpe(fields: Mapping[str, Any], file: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    rule = str(fields.get("tokenizer.ggml.pre", "default"))
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    if len(vocab) < len(fields["tokenizer.ggml.tokens"]):
        raise ValueError("a token is there twice")
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
            f"The tokenizer splits text by the rule {rule!r}, which is not known here.",
            where=str(file),
            allowed=", ".join([*_PATTERNS, *_GPT2]),
            next_step=FROM_FOLDER,
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _sentencepiece(fields: Mapping[str, Any], file: Path) -> Any:
    """Llama 2's kind: transformers converts it; special tokens are set afterwards."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer
    # Alone in a folder: a tokenizer_config.json beside the file could name code, or another class.
    with tempfile.TemporaryDirectory(prefix="minitron-gguf-") as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        return loaded.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False).backend_tokenizer


_BUILDERS: dict[str, Callable[[Mapping[str, Any], Path], Any]] = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
"""tokenizer.ggml.model -> builder."""


def _add_special(tokenizer: Any, fields: Mapping[str, Any], bos: str | None) -> None:
    from tokenizers import AddedToken, processors

    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", [])
    of_type = {kind: [tokens[i] for i, t in enumerate(types) if t == kind] for kind in (_CONTROL, _USER_DEFINED)}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of_type[_CONTROL]])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in of_type[_USER_DEFINED]])
    # The file may leave the question open; these two kinds then begin with bos.
    begins = fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") in _WHOLE_TOKENS_FIRST
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", begins):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    elif fields["tokenizer.ggml.model"] == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
