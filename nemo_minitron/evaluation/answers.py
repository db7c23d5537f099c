"""How likely a model finds given answers, and what it answers itself; through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.hf.transformers_versions import generate
from nemo_minitron.system.progress import Progress

Sequences = Sequence[tuple[list[int], list[int]]]
"""Token ids of prompts and of answers."""
TOKENS_PER_BATCH, PROMPTS_PER_BATCH = 2048, 16
PADDING = 0
"""Never seen: it is masked before a prompt, and follows the end of an answer. A tokenizer's own padding token may lie
outside the embeddings."""


@torch.inference_mode()
def answer_log_probs(model: Any, sequences: Sequences, progress: Progress, what: str) -> list[float]:
    """log p(answer | prompt) of each, nats, summed over its tokens; batches hold answers of like length."""
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])))
    found: dict[int, float] = {}
    with progress.bar(what, len(order), "answers") as bar:
        for batch in _batches(order, sequences):
            found.update(zip(batch, _log_probs(model, [sequences[index] for index in batch]), strict=True))
            bar.advance(len(batch))
    return [found[index] for index in range(len(sequences))]


def _batches(order: Sequence[int], sequences: Sequences) -> list[list[int]]:
    out: list[list[int]] = [[]]
    for index in order:
        # Sorted by length: the newest is the longest.
        if out[-1] and (len(out[-1]) + 1) * sum(map(len, sequences[index])) > TOKENS_PER_BATCH:
            out.append([])
        out[-1].append(index)
    return [batch for batch in out if batch]


def _log_probs(model: Any, batch: Sequences) -> list[float]:
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    answers = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(batch):
        size = len(prompt) + len(answer)
        tokens[row, :size] = torch.tensor(prompt + answer)
        answers[row, len(prompt) : size] = True
    tokens, answers = tokens.to(model.device), answers.to(model.device)
    # Padding is on the right: causal attention never looks at it.
    hidden: Tensor = model.base_model(tokens[:, :-1]).last_hidden_state
    # The output layer is most of a small model's work, and only what precedes an answer's token needs it.
    wanted = answers[:, 1:]
    logits: Tensor = model.get_output_embeddings()(hidden[wanted]).float()
    at_next = logits.log_softmax(-1).gather(-1, tokens[:, 1:][wanted][:, None])[:, 0]
    per_row = torch.zeros(wanted.shape, dtype=at_next.dtype, device=at_next.device).masked_scatter(wanted, at_next)
    return per_row.sum(-1).tolist()


@torch.inference_mode()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    progress: Progress,
    spelled_stop: str | None = None,
) -> list[tuple[str, int]]:
    """(text, its tokens) for each prompt, up to the end of the turn: an eos token, or the text `spelled_stop`."""
    from transformers import GenerationConfig

    stops = turn_ends(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=PADDING,
        stop_strings=None if spelled_stop is None else [spelled_stop],
    )
    # Of like length: the padding of a batch is work for nothing.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, tuple[str, int]] = {}
    with progress.bar("answers", len(prompts), "answers") as bar:
        for start in range(0, len(order), PROMPTS_PER_BATCH):
            batch = order[start : start + PROMPTS_PER_BATCH]
            continued = _continued(model, tokenizer, [prompts[i] for i in batch], config)
            for index, made in zip(batch, continued, strict=True):
                end = next((place for place, token in enumerate(made) if token in stops), len(made))
                found[index] = _before(spelled_stop, made[:end], tokenizer)
            bar.advance(len(batch))
    return [found[index] for index in range(len(prompts))]


def turn_ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the model, and the tokenizer's eos."""
    found = model.generation_config.eos_token_id
    ends = {*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id}
    return sorted(ends - {None})


def _before(stop: str | None, tokens: list[int], tokenizer: Any) -> tuple[str, int]:
    """(the text before `stop`, its tokens)."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    if stop is None or stop not in text:
        return text, len(tokens)
    text, size = text[: text.index(stop)], len(tokens)
    while len(tokenizer.decode(tokens[:size], skip_special_tokens=True)) > len(text):
        size -= 1
    return text, size


def _continued(model: Any, tokenizer: Any, prompts: Sequence[list[int]], config: Any) -> list[list[int]]:
    """New tokens for each prompt, with padding behind the end of the shorter ones."""
    longest, padding = max(map(len, prompts)), config.pad_token_id
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    made = generate(model, ids, config, attention_mask=seen, tokenizer=tokenizer)
    return made[:, longest:].tolist()
