"""Small folders as a version of transformers saves them, without weights: `python -m tests.support.saved_by`.

Run with another version installed, it adds that version's folders to tests/data/saved_by.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.tiny_models import CHAT_TEMPLATE, FAMILY_CASES, tiny_config, tiny_tokenizer

SAVED_BY = Path(__file__).parents[1] / "data" / "saved_by"
VERSIONS = sorted(folder.name for folder in SAVED_BY.glob("*"))
TEXTS = (
    "The quick brown fox <|im_end|> jumps over 12 dogs.",
    "  numbers 1234567, a na\u00efve cafe\u0301\n\n don't <|im_start|>x <s> y",
)
IDS_FILE = "ids.json"
"""File with text -> ids, as made by the version that saved the folder."""


def byte_level(digits: bool = False, nfc: bool = False) -> Any:
    """Return the tiny BPE, with single digits as in SmolLM2 or with Qwen's rules."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    from nemo_minitron.hf.gguf_tokenizer import _PATTERNS

    trained = tiny_tokenizer().backend_tokenizer
    backend = type(trained).from_str(trained.to_str())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if nfc:
        split = pre_tokenizers.Split(Regex(_PATTERNS["qwen2"]), behavior="isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Sequence([split, rest])
    return backend


def llama2() -> Any:
    """Return a tokenizer like Llama 2's, with bos before every text."""
    from nemo_minitron.hf.gguf_tokenizer import _add_special, _sentencepiece

    pieces = ["\u2581", "\u2581h", "he", "e", "h", "\u2581he", "x", "\u2581x", "y", "o", "\u2581o", "1", "2", "12"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(number) for number in range(len(pieces))],
        "tokenizer.ggml.token_type": [3, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.unknown_token_id": 0,
    }
    backend = _sentencepiece(fields, Path())
    _add_special(backend, fields, "<s>")
    return backend


_END = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BPE = {"bos_token": _END, "eos_token": _END, "pad_token": _END}
_ADDED = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (byte_level, {"tokenizer_class": "PreTrainedTokenizerFast", **_BPE, **_ADDED}),
    "gpt2_digits": (lambda: byte_level(digits=True), {"tokenizer_class": "GPT2Tokenizer", **_BPE, **_ADDED}),
    "qwen2": (lambda: byte_level(nfc=True), {"tokenizer_class": "Qwen2Tokenizer", **_BPE, **_ADDED}),
    "llama": (llama2, {"tokenizer_class": "LlamaTokenizer", **_LLAMA}),
    "llama_no_bos": (llama2, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, **_LLAMA}),
}
"""Name -> tokenizer, and the tokenizer_config.json with which it is first loaded."""


def write_all() -> None:
    """Save every tokenizer and every family's config with the installed version."""
    from transformers import AutoTokenizer, GenerationConfig, __version__

    for name, (make, config) in KINDS.items():
        out = SAVED_BY / __version__ / name
        with tempfile.TemporaryDirectory() as first:
            make().save(str(Path(first) / "tokenizer.json"))
            (Path(first) / "tokenizer_config.json").write_text(json.dumps(config))
            (Path(first) / "chat_template.jinja").write_text(CHAT_TEMPLATE)
            tokenizer: Any = AutoTokenizer.from_pretrained(first)
        tokenizer.save_pretrained(out)
        ids = {text: tokenizer(text).input_ids for text in TEXTS}
        (out / IDS_FILE).write_text(json.dumps(ids, indent=1) + "\n")
    for case in FAMILY_CASES:
        out = SAVED_BY / __version__ / "configs" / case
        config = tiny_config(case)
        config.save_pretrained(out)
        GenerationConfig.from_model_config(config).save_pretrained(out)


def saved(folder: Path, vocab_size: int = 512) -> Path:
    """Create a folder with a tokenizer in the form of transformers 4 and a model config."""
    shutil.copytree(SAVED_BY / "4.57.6/plain", folder, dirs_exist_ok=True)
    edit(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    config = {"model_type": "llama", "vocab_size": vocab_size, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit(file: Path, drop: tuple[str, ...] = (), **keys: Any) -> None:
    content = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(content | keys))


if __name__ == "__main__":
    write_all()
