"""Chat template bound to a tokenizer, which renders rows as exact text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.jinja import render_chat
from nemo_minitron.data.chat.purity import require_pure
from nemo_minitron.data.chat.rows import BadRow, Message
from nemo_minitron.data.chat.templates import TEMPLATES
from nemo_minitron.errors import DataError, shortened
from nemo_minitron.hf.checkpoint import read_config
from nemo_minitron.hf.tokenizer import beyond_vocabulary, load_tokenizer, require_known_ids
from nemo_minitron.limits import TEMPLATE_BYTES, TEMPLATE_SECONDS, Limit, TimeIsUp, cpu_seconds, memory
from nemo_minitron.schema.base import TEMPLATE_DATE
from nemo_minitron.schema.chats import TemplateName

Attributes = Mapping[str, float]
_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "What is six times seven?"},
    {"role": "assistant", "content": "Forty-two."},
)
"""Dialogue whose rendering shows what a template writes after an answer."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders dialogues as `tokenizer.apply_chat_template` does, split into prompt and answer."""

    tokenizer: Any
    jinja: str
    stop: str | None
    """Text that ends an answer; None means the first special token that the template writes after it."""
    markers: re.Pattern[str]
    """Matches tokens that no text of a row may contain, because they would end or begin a turn."""
    rated_end: str = ""
    vocab_size: int | None = None
    """Vocabulary size of the model that reads the ids; None if unknown."""
    day: date = TEMPLATE_DATE
    """Date for templates that write the current date."""

    @classmethod
    def load(
        cls, model_dir: Path, name: TemplateName, *, whole_markers: bool = True, day: date = TEMPLATE_DATE
    ) -> ChatTemplate:
        """Load the template of this name with the tokenizer of a model folder.

        Raises:
            CheckpointError: there is no readable tokenizer.
            DataError: the tokenizer has no chat template (name = model) or splits the markers into several tokens;
                the model has no embeddings for them; or the template depends on more than the messages.
        """
        size = read_config(model_dir).get("vocab_size") if (model_dir / "config.json").is_file() else None
        return cls.bind(
            load_tokenizer(model_dir),
            name,
            whole_markers=whole_markers,
            where=str(model_dir),
            vocab_size=None if size is None else int(size),
            day=day,
        )

    @classmethod
    def bind(
        cls,
        tokenizer: Any,
        name: TemplateName,
        *,
        whole_markers: bool = True,
        where: str = "",
        vocab_size: int | None = None,
        day: date = TEMPLATE_DATE,
    ) -> ChatTemplate:
        """Bind the template to a loaded tokenizer; see `load`."""
        special = _special_tokens(tokenizer)
        if name == "model":
            own = _own_template(tokenizer, where)
            # The folder carries one of the named templates, whose stop tokens are known.
            named = next((known for known, template in TEMPLATES.items() if template.jinja == own), None)
            if named is None:
                require_pure(own, where)
                _require_embedded(tokenizer, own, vocab_size, where)
                return cls(tokenizer, own, None, _any_of(special), vocab_size=vocab_size, day=day)
            name = named
        template = TEMPLATES[name]
        if whole_markers:
            _require_whole(tokenizer, name, where)
        _require_embedded(tokenizer, " ".join(template.markers), vocab_size, where)
        markers = _any_of({*template.markers, *special})
        return cls(tokenizer, template.jinja, template.stop, markers, template.rated_end, vocab_size, day)

    def prompt(self, messages: Sequence[Message], attributes: Attributes | None = None) -> str:
        """Return the text up to and including the generation prompt.

        Raises:
            BadRow: the template refuses the messages.
        """
        return self._apply(messages, attributes, add_generation_prompt=True)

    def answer(self, prompt: str, messages: Sequence[Message], attributes: Attributes | None = None) -> str:
        """Return the text after the prompt: the last message, up to and including the token that ends it.

        Raises:
            BadRow: a text contains a marker, or the rendered dialogue does not continue the rendered prompt.
        """
        self.require_no_marker(messages)
        if attributes and "attributes" not in self.jinja:
            raise BadRow("the chat template of the model does not write attributes")
        dialogue = self._apply(messages, attributes, add_generation_prompt=False)
        text, reasoning = messages[-1]["content"].strip(), messages[-1].get("reasoning_content", "").strip()
        thought = dialogue.find(reasoning, len(prompt))
        if dialogue.startswith(prompt) and thought < 0:
            raise BadRow("the chat template leaves out the reasoning_content of the answer")
        # Search after the reasoning, which may contain the words of the answer.
        start = dialogue.find(text, thought + len(reasoning))
        if not dialogue.startswith(prompt) or start < 0:
            raise BadRow("the chat template does not continue its own generation prompt with the answer")
        end = start + len(text)
        return dialogue[len(prompt) : end] + self._end_of_turn(dialogue[end:])

    def require_no_marker(self, messages: Sequence[Message]) -> None:
        """Raise BadRow if a text contains a token that would end or begin a turn."""
        for message in messages:
            for text in message.values():
                if found := self.markers.search(text):
                    raise BadRow(
                        f"a text of {message['role']} contains {found.group()}, which the tokenizer reads as a marker"
                    )

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text that already contains all its special tokens.

        Raises:
            DataError: the model has no embedding for one of the ids.
        """
        found: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        require_known_ids(found, self.vocab_size, self.tokenizer, str(self.tokenizer.name_or_path))
        return found

    def end_of_turn(self) -> str | None:
        """Return the text that ends an answer, for programs that generate; None if the tokenizer has no such token.

        With `stop` = None it is the first special token after the answer of a short dialogue, otherwise the eos token.
        """
        if self.stop is not None:
            return self.stop
        try:
            dialogue = self._apply(_PROBE, None, add_generation_prompt=False)
        except BadRow:  # for instance, the template requires a system message
            dialogue = ""
        _, answer, tail = dialogue.rpartition(_PROBE[-1]["content"])
        found = self.markers.search(tail) if answer else None
        eos: str | None = self.tokenizer.eos_token
        return eos if found is None else found.group()

    def spelled_stop(self) -> str | None:
        """Return the stop text if it is several tokens, so that no single token id ends an answer; otherwise None."""
        return self.stop if self.stop is not None and len(self.ids(self.stop)) > 1 else None

    def require_boundary(self, prompt: str, answer: str) -> tuple[int, int]:
        """Return the numbers of tokens of prompt and answer.

        Raises:
            BadRow: the tokens of prompt and answer together do not begin with those of the prompt alone, with which
                generation starts; or the answer has no token.
        """
        alone, together = self.ids(prompt), self.ids(prompt + answer)
        if together[: len(alone)] != alone:
            raise BadRow(
                f"the end of the prompt {prompt[-12:]!r} is tokenized differently before the answer {answer[:12]!r}"
            )
        if len(together) == len(alone):
            raise BadRow(f"the tokenizer has no token for the answer {answer[:12]!r}")
        return len(alone), len(together) - len(alone)

    def _end_of_turn(self, tail: str) -> str:
        if self.stop is None:
            found = self.markers.search(tail)
            return tail[: found.end()] if found else tail + str(self.tokenizer.eos_token or "")
        at = tail.find(self.stop)
        return tail[: at + len(self.stop)] if at >= 0 else tail + self.stop

    def _apply(self, messages: Sequence[Message], attributes: Attributes | None, *, add_generation_prompt: bool) -> str:
        try:
            with cpu_seconds(TEMPLATE_SECONDS), memory(TEMPLATE_BYTES):
                text = render_chat(
                    self.jinja,
                    messages,
                    self.tokenizer,
                    day=self.day,
                    add_generation_prompt=add_generation_prompt,
                    attributes=dict(attributes or {}),
                )
        except TimeIsUp:
            # This is an error, not a bad row, because the next row would take as long.
            raise self._over_limit(f"takes more than {TEMPLATE_SECONDS.value()} s", TEMPLATE_SECONDS) from None
        except MemoryError:
            raise self._over_limit(f"takes more than {TEMPLATE_BYTES.value():,} bytes", TEMPLATE_BYTES) from None
        except Exception as error:  # a template is a program: it may refuse a system text, or fail in any other way
            raise BadRow(f"the chat template refuses the messages: {shortened(error)}") from error
        if len(text) > TEMPLATE_BYTES.value() // 10:
            raise self._over_limit(f"writes {len(text):,} characters", TEMPLATE_BYTES)
        return text

    def _over_limit(self, does: str, limit: Limit) -> DataError:
        return DataError(
            f"The chat template {does} for one dialogue.",
            where=str(self.tokenizer.name_or_path),
            next_step=f"Choose another template. {limit.how_to_raise()}",
        )


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    # Longest first. Without tokens, the pattern matches nothing.
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _special_tokens(tokenizer: Any) -> set[str]:
    """Return the named special tokens, and the added tokens marked as special, such as the control tokens of Llama 3.x,
    which have no name."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _split_markers(tokenizer: Any, name: TemplateName) -> list[str]:
    backend = tokenizer.backend_tokenizer
    return [token for token in TEMPLATES[name].markers if len(backend.encode(token, add_special_tokens=False).ids) != 1]


def _require_whole(tokenizer: Any, name: TemplateName, where: str) -> None:
    split = _split_markers(tokenizer, name)
    if not split:
        return
    known: list[str] = [other for other in TEMPLATES if not _split_markers(tokenizer, other)]
    known += ["model"] if tokenizer.chat_template else []
    raise DataError(
        f"Template {name} uses {', '.join(split)}, which the tokenizer does not know as single tokens.",
        where=where,
        allowed=f"with this tokenizer: {', '.join(known) or 'no template'}",
        next_step="Choose another template, add the tokens to the model, or set whole_markers=false.",
    )


def _require_embedded(tokenizer: Any, written: str, vocab_size: int | None, where: str) -> None:
    """Raise DataError if the model has no embedding for an added token that the template writes."""
    if vocab_size is None:
        return
    named = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token") if key in written}
    for token, number in sorted(tokenizer.get_added_vocab().items(), key=lambda item: int(item[1])):
        if number >= vocab_size and (token in written or token in named.values()):
            raise beyond_vocabulary(f"The chat template's marker {token}", number, vocab_size, where)


def _own_template(tokenizer: Any, where: str) -> str:
    try:
        # If there are several named templates, this returns the default.
        own = tokenizer.get_chat_template()
        if not isinstance(own, str):
            raise ValueError("it is not text")
        return own
    except (ValueError, TypeError) as error:
        raise DataError(
            "The tokenizer has no chat template, or several without a default.",
            where=where,
            allowed=f"template = {', '.join(TEMPLATES)}",
            next_step="Choose one of these; it is then saved with the exported model.",
        ) from error
