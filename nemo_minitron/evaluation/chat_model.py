"""A finished model that answers in a dialogue, piece by piece while it generates."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, TextStreamer

from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import ConfigError
from nemo_minitron.evaluation.agreement import load_compared, memory_of
from nemo_minitron.evaluation.answers import PADDING, turn_ends
from nemo_minitron.evaluation.stop_text import split_at_stop
from nemo_minitron.hf.checkpoint import read_config
from nemo_minitron.hf.tokenizer import load_tokenizer, require_known_ids
from nemo_minitron.hf.transformers_versions import generate

TOP_K = 50
"""With a temperature above 0, sample from this many most likely tokens."""


class ChatModel:
    """A loaded model with its tokenizer and chat template."""

    def __init__(
        self,
        folder: Path,
        attributes: dict[str, float],
        max_new_tokens: int,
        temperature: float,
        day: datetime.date,
        warn: Callable[[str], None],
    ) -> None:
        """Load the model, after its logits have been compared with Megatron's.

        Args:
            attributes: values that an attribute-conditioned model gets before each answer.
            temperature: 0 selects the most likely token.
            day: the date that the chat template inserts.
            warn: receives a message if the model has no chat template.

        Raises:
            ConfigError: attributes for a model without them.
        """
        transformers.logging.set_verbosity_error()
        self.tokenizer: Any = load_tokenizer(folder)
        self.vocab_size = int(read_config(folder)["vocab_size"])
        self.template: ChatTemplate | None = None
        if self.tokenizer.chat_template is None:
            warn("the model continues the text as it is")
        else:
            options: dict[str, Any] = {"where": str(folder), "vocab_size": self.vocab_size, "day": day}
            self.template = ChatTemplate.bind(self.tokenizer, "model", whole_markers=False, **options)
        if attributes and (self.template is None or "attributes" not in self.template.jinja):
            raise ConfigError(
                "This model was not trained with attributes: its chat template has no place for them.",
                where=str(folder),
                next_step="Leave --attributes out, or chat with a model of a steerlm_sft stage.",
            )
        self.stop = None if self.template is None else self.template.spelled_stop()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = load_compared(folder, "fp32", device, memory=memory_of(folder))
        self.attributes, self.max_new_tokens, self.temperature = attributes, max_new_tokens, temperature

    def answer(self, messages: list[dict[str, str]], show: Callable[[str, bool], None]) -> str:
        """Generate and return the answer; Ctrl-C ends it early.

        Args:
            show: receives each piece of text, and whether it is the last one.
        """
        pieces: list[str] = []
        stop, held = self.stop, ""

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                nonlocal held
                piece, held = split_at_stop(stop, held + text, last=stream_end)
                pieces.append(piece)
                show(piece, stream_end)

        ids = self._ids(messages)
        is_sampling = self.temperature > 0
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=is_sampling,
            eos_token_id=turn_ends(self.model, self.tokenizer) or None,
            pad_token_id=PADDING,
            stop_strings=None if stop is None else [stop],
            **({"temperature": self.temperature, "top_k": TOP_K} if is_sampling else {}),
        )
        options: dict[str, Any] = {"attention_mask": ids.new_ones(ids.shape), "tokenizer": self.tokenizer}
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            generate(self.model, ids, config, streamer=streamer, **options)
        except KeyboardInterrupt:
            show("", True)
        return "".join(pieces).strip()

    def _ids(self, messages: list[dict[str, str]]) -> Any:
        """Return the token ids of the dialogue, shape [1, S]."""
        if self.template is None:
            found = self.tokenizer("\n".join(message["content"] for message in messages)).input_ids
            require_known_ids(found, self.vocab_size, self.tokenizer, str(self.tokenizer.name_or_path))
        else:
            try:
                found = self.template.ids(self.template.prompt(messages, self.attributes))
            except BadRow as reason:
                raise ConfigError(f"The dialogue cannot be written: {reason}", where="minitron chat") from reason
        return torch.tensor([found], device=self.model.device)
