"""Loading a model into transformers, and greedy generation, as a user of the exported folder does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.errors import CheckpointError
from nemo_minitron.evaluation.model_config import generation_config, model_config
from nemo_minitron.hf.checkpoint import Checkpoint, require_tied_head
from nemo_minitron.hf.tokenizer import require_known_ids
from nemo_minitron.hf.transformers_versions import dtype_option, generate
from nemo_minitron.system.heap import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_for_inference(model_dir: Path, precision: str, device: str, *, num_layers: int | None = None) -> Any:
    """Load the model into transformers with a config from our own reader. Stages call `load_compared` instead.

    Args:
        num_layers: number of layers to load, from the first on; None: all.

    Raises:
        CheckpointError: the folder is not a complete, supported model, or it also contains an adapter.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(model_dir)
    require_tied_head(checkpoint)
    _require_no_adapter(model_dir)
    shape = checkpoint.shape if num_layers is None else checkpoint.shape.resized(num_layers=num_layers)
    if device == "cpu":
        keep_freed_memory()
    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            config=model_config(shape),
            generation_config=generation_config(checkpoint),
            **dtype_option(DTYPES[precision]),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return model.to(device).eval()


def _require_no_adapter(model_dir: Path) -> None:
    # transformers adds an adapter to the weights if peft is installed; Megatron never does.
    file = model_dir / "adapter_config.json"
    if file.is_file():
        raise CheckpointError(
            "The folder contains an adapter beside the model's weights, so it is ambiguous which model is meant.",
            where=str(file),
            next_step="Merge the adapter into the weights, or move adapter_config.json elsewhere.",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off transformers' progress bars, and its warning about layers that are not loaded."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


@torch.inference_mode()
def greedy_texts(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, str]]:
    """Return [{prompt, text}] with the greedy continuation of each prompt, without a chat template."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if ends is None else ends
    padding = stop[0] if isinstance(stop, list) else stop
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0 if padding is None else padding,
    )
    out = []
    for prompt in prompts:
        found = tokenizer(prompt).input_ids
        require_known_ids(found, model.config.vocab_size, tokenizer, str(tokenizer.name_or_path))
        ids = torch.tensor([found or [config.pad_token_id]], device=model.device)
        made = generate(model, ids, config, attention_mask=torch.ones_like(ids))
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        out.append({"prompt": prompt, "text": text})
    return out
