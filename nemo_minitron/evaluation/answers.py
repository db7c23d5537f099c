"""Log-probabilities of given answers, and generation of answers, with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_minitron.evaluation.sharing import share_out
from nemo_minitron.hf.transformers_versions import generate
from nemo_minitron.system.progress import Progress

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.runtime.session import Session

Sequences = Sequence[tuple[list[int], list[int]]]
"""Token ids of prompts and of answers."""
TOKENS_PER_BATCH, PROMPTS_PER_BATCH = 2048, 16
PADDING = 0
"""Token id for padding. Its value has no effect: it is masked before a prompt and comes after the end of an answer. The
tokenizer's own padding token may be outside the embeddings."""


def answer_log_probs(
    model: Any, sequences: Sequences, progress: Progress, what: str, session: Session | None = None
) -> list[float]:
    """Return log p(answer | prompt) in nats, summed over the tokens of each answer; batches hold similar lengths.

    Args:
        session: its ranks share out the batches; all of them call this function and get all values. None: one process.
    """
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])))
    batches = _batches(order, sequences)

    @torch.inference_mode()
    def compute(own: list[list[int]]) -> list[list[float]]:
        found = []
        with progress.bar(what, sum(map(len, own)), "answers") as bar:
            for batch in own:
                found.append(_log_probs(model, [sequences[index] for index in batch]))
                bar.advance(len(batch))
        return found

    return _in_order(batches, share_out(batches, range(len(batches)), compute, session))


def _in_order(batches: list[list[int]], results: list[Sequence[Any]]) -> list[Any]:
    """Return the results of all batches in the order of their rows; a batch is a list of row numbers."""
    found = {
        row: value
        for batch, of_batch in zip(batches, results, strict=True)
        for row, value in zip(batch, of_batch, strict=True)
    }
    return [found[row] for row in range(len(found))]


def _batches(order: Sequence[int], sequences: Sequences) -> list[list[int]]:
    out: list[list[int]] = [[]]
    for index in order:
        # The order is by length, so the current sequence is the longest.
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
    # Padding is on the right, where causal attention does not see it.
    hidden: Tensor = model.base_model(tokens[:, :-1]).last_hidden_state
    # The output layer is most of a small model's work, and only positions before an answer's token need it.
    wanted = answers[:, 1:]
    logits: Tensor = model.get_output_embeddings()(hidden[wanted]).float()
    at_next = logits.log_softmax(-1).gather(-1, tokens[:, 1:][wanted][:, None])[:, 0]
    per_row = torch.zeros(wanted.shape, dtype=at_next.dtype, device=at_next.device).masked_scatter(wanted, at_next)
    return per_row.sum(-1).tolist()


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    progress: Progress,
    spelled_stop: str | None = None,
    session: Session | None = None,
) -> list[tuple[str, int]]:
    """Return (text, number of tokens) of each answer, up to an end token or the text `spelled_stop`.

    Args:
        session: its ranks share out the batches; all of them call this function and get all answers. None: one process.
    """
    from transformers import GenerationConfig

    stops = turn_ends(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=PADDING,
        stop_strings=None if spelled_stop is None else [spelled_stop],
    )
    # Batches of similar length need little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + PROMPTS_PER_BATCH] for start in range(0, len(order), PROMPTS_PER_BATCH)]

    @torch.inference_mode()
    def compute(own: list[list[int]]) -> list[list[tuple[str, int]]]:
        found = []
        with progress.bar("answers", sum(map(len, own)), "answers") as bar:
            for batch in own:
                answers = continued(model, tokenizer, [prompts[index] for index in batch], config)
                found.append([before_stop(spelled_stop, before_end(made, stops), tokenizer) for made in answers])
                bar.advance(len(batch))
        return found

    return _in_order(batches, share_out(batches, range(len(batches)), compute, session))


def before_end(tokens: list[int], stops: Sequence[int]) -> list[int]:
    """Return the tokens before the first one that ends an answer."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in stops), len(tokens))]


def turn_ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's end tokens and the tokenizer's eos token."""
    found = model.generation_config.eos_token_id
    ends = {*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id}
    return sorted(ends - {None})


def before_stop(stop: str | None, tokens: list[int], tokenizer: Any) -> tuple[str, int]:
    """Return (text before `stop`, number of its tokens)."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    if stop is None or stop not in text:
        return text, len(tokens)
    text, size = text[: text.index(stop)], len(tokens)
    while len(tokenizer.decode(tokens[:size], skip_special_tokens=True)) > len(text):
        size -= 1
    return text, size


def continued(model: Any, tokenizer: Any, prompts: Sequence[list[int]], config: Any) -> list[list[int]]:
    """Return the new tokens for each prompt; shorter answers are padded at the end."""
    longest, padding = max(map(len, prompts)), config.pad_token_id
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    made = generate(model, ids, config, attention_mask=seen, tokenizer=tokenizer)
    return made[:, longest:].tolist()
