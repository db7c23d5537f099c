"""Sample texts and speed through plain transformers: what a user of the exported model will see."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_for_inference(model_dir: Path, precision: str, device: str) -> Any:
    """The model as `transformers` loads it from its folder."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=DTYPES[precision], local_files_only=True)
    return model.to(device).eval()


@torch.inference_mode()
def greedy_texts(model: Any, model_dir: Path, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, str]]:
    """[{prompt, text}]: the most likely continuation of each prompt, deterministic."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    out = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
        )
        text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        out.append({"prompt": prompt, "text": text})
    return out


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, Any], *, prompt_tokens: int, new_tokens: int, rounds: int, tick: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Prefill and generation speed of every model, batch 1, in tokens/s; the rounds are interleaved.

    Medians over the rounds, and the fastest and slowest round. Ratios are to the first model.
    """
    prefill: dict[str, list[float]] = {label: [] for label in models}
    generate: dict[str, list[float]] = {label: [] for label in models}
    for round_number in range(rounds + 1):
        for label, model in models.items():
            ids = torch.arange(prompt_tokens, device=model.device)[None] + 10
            prefill_s = _seconds(partial(model, ids, use_cache=True), model)
            generate_s = _seconds(partial(_generate, model, ids, new_tokens), model)
            if round_number:  # the first round warms up
                prefill[label].append(prompt_tokens / prefill_s)
                generate[label].append((new_tokens - 1) / max(generate_s - prefill_s, 1e-9))
        tick()
    first = next(iter(models))
    return {
        label: {
            **_spread("prefill", prefill[label], median(prefill[first])),
            **_spread("generate", generate[label], median(generate[first])),
        }
        for label in models
    }


def _generate(model: Any, ids: torch.Tensor, new_tokens: int) -> None:
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def _seconds(call: Callable[[], object], model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    call()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def _spread(name: str, values: Sequence[float], reference: float) -> dict[str, float]:
    key = f"{name}_tokens_per_s"
    middle = median(values)
    return {key: middle, f"{key}_min": min(values), f"{key}_max": max(values), f"{name}_ratio": middle / reference}
