"""Sampling of answers with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_minitron.evaluation.answers import PADDING, before_end, before_stop, continued, turn_ends


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_text: str | None
    """Text that ends an answer if no single token does."""


@torch.inference_mode()
def sampled_answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling, seed: int
) -> list[str | None]:
    """Return one answer to each prompt, all in one batch; None for an answer that did not end.

    Args:
        prompts: token ids; a prompt may be repeated.
        seed: seed of the random numbers. The global generators of torch are left as they were.
    """
    from transformers import GenerationConfig

    ends = turn_ends(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        eos_token_id=ends or None,
        pad_token_id=PADDING,
        stop_strings=None if sampling.stop_text is None else [sampling.stop_text],
    )
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        made = continued(model, tokenizer, prompts, config)
    return [_ended_text(tokens, ends, sampling.stop_text, tokenizer) for tokens in made]


def _ended_text(tokens: list[int], ends: Sequence[int], stop: str | None, tokenizer: Any) -> str | None:
    """Return the text before the first end token or stop text; None if there is neither."""
    answer = before_end(tokens, ends)
    has_end = len(answer) < len(tokens)
    if not has_end and (stop is None or stop not in tokenizer.decode(tokens, skip_special_tokens=True)):
        return None
    return before_stop(stop, answer, tokenizer)[0]
