"""The answers to a batch of prompts, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.schema.answers import AnswerSampling
from nemo_minitron.stages.common.rated_text import answer_text
from nemo_minitron.stages.steerlm2_answers.prompts import Prompt
from nemo_minitron.system.progress import Progress

KEPT = ("values", "outputs", "rated")
Record = dict[str, Any]
"""Answers to one prompt: {"values": [text], "outputs": [text with the end of its turn], "rated": [dialogue for the
attribute model], "log_q": [nats], "sizes": [tokens of the prompt, tokens of each answer], "drawn", "ended": counts}.
The lists are empty if there were too few usable answers."""


@dataclass(frozen=True)
class AnswerReader:
    """Renders sampled answers as training text."""

    params: AnswerSampling
    template: ChatTemplate
    rating_template: ChatTemplate
    """Template of the attribute model."""

    def texts(self, prompt: Prompt, value: str) -> tuple[str, str] | None:
        """Return the training text of an answer with the end of its turn, and the dialogue for the attribute model.

        Returns None for an answer that is empty or too long, or that a template or tokenizer cannot represent.
        """
        if not value:
            return None
        messages = [*prompt.messages, {"role": "assistant", "content": value}]
        longest = self.params.max_seq_len_tokens
        try:
            output = self.template.answer(prompt.conditioned, messages, prompt.attributes)
            if output != self.template.answer(prompt.plain, messages):
                return None
            size = sum(self.template.require_boundary(prompt.conditioned, output))
            self.template.require_boundary(prompt.plain, output)
            rated = answer_text({"messages": messages}, self.rating_template, longest, LengthStats())
        except BadRow:
            return None
        return None if rated is None or size > longest else (output, rated)

    def tokens(self, prompt: str, output: str) -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt and of the answer."""
        start = self.template.ids(prompt)
        return start, self.template.ids(prompt + output)[len(start) :]


def sample_batch(batch: Sequence[Prompt], number: int, reader: AnswerReader, model: Any) -> list[Record]:
    """Sample the answers to a batch of prompts, and compute log Q'(y|a,x).

    An answer that did not end or cannot be used is sampled again. This restricts Q' to usable answers, which multiplies
    the weights of all answers to a prompt by the same constant and so has no effect after their normalization.

    Args:
        number: number of the batch, which determines the random numbers.
        model: the SteerLM model in transformers.
    """
    from nemo_minitron.evaluation.sampling import Sampling, sampled_answers

    params, template = reader.params, reader.template
    sampling = Sampling(params.temperature, params.top_p, params.max_new_tokens, template.spelled_stop())
    records: list[Record] = [{**{key: [] for key in KEPT}, "drawn": 0, "ended": 0} for _ in batch]
    for attempt in range(params.max_attempts):
        missing = [
            index
            for index, record in enumerate(records)
            for _ in range(params.answers_per_prompt - len(record["values"]))
        ]
        if not missing:
            break
        (seed,) = np.random.SeedSequence((params.seed, number, attempt)).generate_state(1)
        prompts = [batch[index].tokens for index in missing]
        texts = sampled_answers(model, template.tokenizer, prompts, sampling, int(seed))
        for index, text in zip(missing, texts, strict=True):
            _add(records[index], batch[index], text, reader)
    return [_measured(prompt, record, reader, model) for prompt, record in zip(batch, records, strict=True)]


def _add(record: Record, prompt: Prompt, text: str | None, reader: AnswerReader) -> None:
    """Count a sampled text, and keep it if it is a usable answer."""
    record["drawn"] += 1
    if text is None:
        return
    record["ended"] += 1
    value = text.strip()
    found = reader.texts(prompt, value)
    if found is not None:
        for key, each in zip(KEPT, (value, *found), strict=True):
            record[key].append(each)


def _measured(prompt: Prompt, record: Record, reader: AnswerReader, model: Any) -> Record:
    """Add log Q'(y|a,x) and the numbers of tokens; empty the record of a prompt with too few usable answers."""
    if len(record["values"]) < reader.params.answers_per_prompt:
        return {**record, **{key: [] for key in (*KEPT, "log_q", "sizes")}}
    sequences = [reader.tokens(prompt.conditioned, output) for output in record["outputs"]]
    sizes = [len(sequences[0][0]), *(len(answer) for _, answer in sequences)]
    return {**record, "log_q": log_probs(model, sequences), "sizes": sizes}


def reference_batch(batch: Sequence[Prompt], records: Sequence[Record], reader: AnswerReader, model: Any) -> Any:
    """Return log P(y|x) of the answers to each prompt of a batch, [prompts][answers].

    Args:
        model: the model without attributes, in transformers.
    """
    return [
        log_probs(model, [reader.tokens(prompt.plain, output) for output in record["outputs"]])
        for prompt, record in zip(batch, records, strict=True)
    ]


def log_probs(model: Any, sequences: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Return the log-probability in nats of each answer, summed over its tokens, which include the end of its turn."""
    from nemo_minitron.evaluation.answers import answer_log_probs

    return answer_log_probs(model, sequences, Progress(silent=True), "") if sequences else []
