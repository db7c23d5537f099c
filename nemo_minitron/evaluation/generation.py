"""The model as a user of the exported folder meets it: plain transformers, and the texts that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.heap import keep_freed_memory
from nemo_minitron.hf.tokenizer import require_known_ids

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_for_inference(model_dir: Path, precision: str, device: str) -> Any:
    """The model as `transformers` loads it from its folder."""
    from transformers import AutoModelForCausalLM

    if device == "cpu":
        keep_freed_memory()
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=DTYPES[precision], local_files_only=True)
    return model.to(device).eval()


@torch.inference_mode()
def greedy_texts(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, str]]:
    """[{prompt, text}]: the most likely continuation of each prompt, token by token; no chat template."""
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
        # The folder's own generation config may ask for sampling or for penalties.
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, use_model_defaults=False
        )
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        out.append({"prompt": prompt, "text": text})
    return out
