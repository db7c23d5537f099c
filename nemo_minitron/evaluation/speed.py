"""Speed of prefill and generation, measured for several models in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

Rates = dict[str, float]
"""For `prefill` and `generate`: {name}_tokens_per_s (median), ..._min, ..._max, and {name}_ratio to the first model."""


def measure_speed(
    models: Mapping[str, Any], *, prompt_tokens: int, new_tokens: int, rounds: int, tick: Callable[[], None]
) -> dict[str, Rates]:
    """Measure the speed of every model at batch size 1, in tokens/s.

    Each round measures all models in turn, so that a slowdown of the machine affects all of them. An additional first
    round warms up and is not counted.
    """
    measured: dict[str, list[tuple[float, float]]] = {label: [] for label in models}
    for round_number in range(rounds + 1):
        for label, model in models.items():
            pair = time_model(model, prompt_tokens, new_tokens)
            if round_number:
                measured[label].append(pair)
        tick()
    return summarize(measured)


@torch.inference_mode()
def time_model(model: Any, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Return (prefill, generation) in tokens/s: one pass over a prompt, then tokens one by one with the KV cache."""
    ids = (torch.arange(prompt_tokens, device=model.device) % model.config.vocab_size)[None]
    started_s = _now_s(model)
    out = model(ids, use_cache=True, logits_to_keep=1)
    read_s = _now_s(model)
    for _ in range(new_tokens):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    written_s = _now_s(model)
    return prompt_tokens / (read_s - started_s), new_tokens / (written_s - read_s)


def _now_s(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def summarize(measured: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Rates]:
    """Return medians, extremes and ratios of (prefill, generation) rates."""
    first = next(iter(measured.values()))
    out: dict[str, Rates] = {}
    for label, pairs in measured.items():
        out[label] = {}
        for column, name in enumerate(("prefill", "generate")):
            rates = [pair[column] for pair in pairs]
            out[label] |= {
                f"{name}_tokens_per_s": median(rates),
                f"{name}_tokens_per_s_min": min(rates),
                f"{name}_tokens_per_s_max": max(rates),
                f"{name}_ratio": median(rates) / median(pair[column] for pair in first),
            }
    return out
