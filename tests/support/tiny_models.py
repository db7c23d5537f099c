"""Tiny random models of every family, as complete Hugging Face folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_minitron.hf.transformers_versions import dtype_option

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

FAMILY_CASES: dict[str, dict[str, Any]] = {
    "llama_mha": {"model_type": "llama", "num_key_value_heads": 8, "intermediate_size": 112},
    "llama_gqa_tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 100000.0},
    "llama31_rope": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    },
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None, "rms_norm_eps": 1e-5},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1000000.0},
    "qwen25_tied": {"model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1000000.0},
    "nemotron": {"model_type": "nemotron", "intermediate_size": 128, "partial_rotary_factor": 0.5},
}
"""Name -> keys of config.json that differ from `_SIZES`. All divide by TP 1/2/4 and PP 1/2."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog while the rain falls on the hills and the river runs to the sea.",
    "A small model learns from a large one: what to keep, what to cut, and how to speak as its teacher does.",
    "Numbers have proof. 0123456789 + - * / = ( ) [ ] { } < > ! ? , . ; : ' \" @ # $ % ^ & _ ~ `",
)


def tiny_config(case: str, **size_overrides: Any) -> Any:
    """Return transformers' config of a case; `size_overrides` are keys of config.json."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**{**_SIZES, **FAMILY_CASES[case], **size_overrides})


def tiny_model(case: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **size_overrides: Any) -> Any:
    """Return a transformers model with random weights, in eval mode; norms and biases differ from their defaults."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(case, **size_overrides), **dtype_option(torch.float32))
    _randomize(model, seed)
    return model.to(dtype).eval()


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers 5 in the output that tests read."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tiny_model_dir(
    tmp_path: Path, case: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **size_overrides: Any
) -> Path:
    """Save a tiny model as `tmp_path/case`: weights, config, generation config, tokenizer, chat template."""
    folder = tmp_path / case
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(case, seed=seed, dtype=dtype, **size_overrides)
    with without_progress_bars():
        model.save_pretrained(folder)
    save_tiny_tokenizer(folder, min(400, model.config.vocab_size))
    return folder


def save_tiny_tokenizer(folder: Path, vocab_size: int = 400) -> None:
    """Write the same bytes under all versions of transformers, which need no repair."""
    from nemo_minitron.hf.tokenizer_writer import write_tokenizer

    tokenizer = tiny_tokenizer(vocab_size)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.eos_token)
    write_tokenizer(folder, tokenizer.backend_tokenizer, special, chat_template=CHAT_TEMPLATE)
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    file.write_text(json.dumps(config))


def load_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the model with plain transformers, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **dtype_option(dtype), local_files_only=True).eval()


@lru_cache
def tiny_tokenizer(vocab_size: int = 400) -> Any:
    """Return a byte-level BPE with a chat template; id 0 is <|endoftext|> (bos, eos and pad)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    """Set weights large enough that every part of the arithmetic affects the logits."""
    generator = torch.Generator().manual_seed(seed)
    one_plus_weight = model.config.model_type == "nemotron"
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            fan_in = 10.0 if "embed" in name else float(parameter.shape[1])
            parameter.copy_(noise * fan_in**-0.5)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.2)
        else:
            parameter.copy_(noise * 0.2 + (0.0 if one_plus_weight else 1.0))
