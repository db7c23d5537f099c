"""Tokenizers of Hugging Face model folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError


def load_fast_tokenizer(model_dir: Path) -> Any:
    """The transformers tokenizer of a folder; code beside it is never run.

    Raises:
        CheckpointError: there is no readable tokenizer, or it has no fast version.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises many types, bare Exception among them
        raise CheckpointError(
            f"The tokenizer cannot be loaded: {_first_line(error)}",
            where=str(model_dir),
            next_step="The model folder needs tokenizer.json and tokenizer_config.json.",
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            "The tokenizer has no fast version.",
            where=str(model_dir),
            next_step="Add a tokenizer.json beside the model.",
        )
    return tokenizer


def tokenizer_fingerprint(model_dir: Path) -> str:
    """sha256 of the vocabulary: equal for the teacher and what was cut from it.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    file = model_dir / "tokenizer.json"
    if file.is_file():
        try:
            vocab = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"The tokenizer cannot be read: {error!r}", where=str(file)) from error
        return hashlib.sha256(json.dumps(vocab, sort_keys=True).encode()).hexdigest()
    for name in ("tokenizer.model", "vocab.json"):
        if (model_dir / name).is_file():
            return hashlib.sha256((model_dir / name).read_bytes()).hexdigest()
    raise CheckpointError("There is no tokenizer beside the model.", where=str(model_dir))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
