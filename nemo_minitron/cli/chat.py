"""`minitron chat`: talk to a finished model in the terminal."""

from __future__ import annotations

import re
import sys
from datetime import date as date_type
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from nemo_minitron.errors import ArtifactError, ConfigError
from nemo_minitron.system.terminal import Screen, write

console = Screen()
LAST_FIRST = ("export", "dpo", "steerlm_sft", "sft", "distill_offline", "distill", "prune")
"""Where the model of a run folder is looked for."""
RESET, EXIT = "/reset", "/exit"
SAMPLED_FROM = 50
"""With a temperature, one of so many likeliest tokens."""


def chat(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_FOLDER", help="A run's folder, or a Hugging Face folder.")],
    attributes: Annotated[
        str | None, typer.Option(help="Of an attribute-conditioned model: helpfulness=4,verbosity=1")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    once: Annotated[str | None, typer.Option(help="Answer this and exit.")] = None,
    date: Annotated[
        str | None, typer.Option(help="Day that the chat template writes, YYYY-MM-DD; today unless given.")
    ] = None,
) -> None:
    """Talk to a finished model. /reset forgets the dialogue, /exit or Ctrl-D ends."""
    from nemo_minitron.data.chat.purity import parse_day

    folder = find_model(model)
    asked = parse_attributes(attributes)
    day = datetime.now().date() if date is None else parse_day(date, "--date")
    speaker = _Speaker(folder, asked, max_new_tokens, temperature, day)
    before = [{"role": "system", "content": system}] if system else []
    if once is not None:
        speaker.answer([*before, {"role": "user", "content": once}])
        return
    console.say(f"{RESET} forgets, {EXIT} ends", f"{folder} ·", "dim")
    messages = list(before)
    while (said := _ask()) is not None:
        if said == RESET:
            messages = list(before)
        elif said.strip():
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": speaker.answer(messages)})


def find_model(path: Path) -> Path:
    """The folder with config.json: the path itself, or the last model that a run has published.

    Raises:
        ArtifactError: there is none.
    """
    if (path / "config.json").is_file():
        return path
    found = [path / name for name in LAST_FIRST if (path / name / "config.json").is_file()]
    if not found:
        raise ArtifactError(
            "No finished model is here.",
            where=str(path),
            allowed=f"a Hugging Face folder, or a run's folder with one of {', '.join(LAST_FIRST)}",
            next_step="minitron status RECIPE shows what has finished.",
        )
    return found[0]


def parse_attributes(text: str | None) -> dict[str, float]:
    """`helpfulness=4,verbosity=1`.

    Raises:
        ConfigError: an unknown attribute, or a value that is no number from 0 to 4.
    """
    from nemo_minitron.schema.chats import AttributeName

    out: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, value = (piece.strip() for piece in part.partition("="))
        number = float(value) if re.fullmatch(r"\d*\.?\d+", value, re.ASCII) else -1.0
        if name not in get_args(AttributeName) or not 0 <= number <= 4:
            raise ConfigError(
                f"--attributes {part.strip()}: not an attribute with a value from 0 to 4.",
                allowed=", ".join(get_args(AttributeName)),
                next_step="Write them as helpfulness=4,verbosity=1",
            )
        out[name] = number
    return out


def until(stop: str | None, text: str, *, last: bool) -> tuple[str, str]:
    """(what can be shown, what waits because it may begin `stop`); behind a stop nothing is shown any more."""
    if stop is None:
        return text, ""
    if stop in text:
        return text[: text.index(stop)], stop
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    kept = 0 if last else next((size for size in sizes if stop.startswith(text[-size:])), 0)
    return text[: len(text) - kept], text[len(text) - kept :]


class _Speaker:
    """A loaded model that streams its answers."""

    def __init__(
        self, folder: Path, attributes: dict[str, float], max_new_tokens: int, temperature: float, day: date_type
    ) -> None:
        import torch
        import transformers

        from nemo_minitron.data.chat.tokenizing import ChatTemplate
        from nemo_minitron.evaluation.agreement import load_compared, memory_of
        from nemo_minitron.hf.checkpoint import read_config
        from nemo_minitron.hf.tokenizer import load_tokenizer

        transformers.logging.set_verbosity_error()
        self.tokenizer: Any = load_tokenizer(folder)
        self.vocab_size = int(read_config(folder)["vocab_size"])
        self.template: ChatTemplate | None = None
        if self.tokenizer.chat_template is None:
            console.say("the text is continued as it stands", "no chat template:", "yellow")
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

    def answer(self, messages: list[dict[str, str]]) -> str:
        """Print the answer while it is written; Ctrl-C ends it early."""
        from transformers import GenerationConfig, TextStreamer

        from nemo_minitron.evaluation.answers import PADDING, turn_ends
        from nemo_minitron.hf.transformers_versions import generate

        pieces: list[str] = []
        stop, waiting = self.stop, ""

        class Shown(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                nonlocal waiting
                shown, waiting = until(stop, waiting + text, last=stream_end)
                pieces.append(shown)
                write(shown, end="\n" if stream_end else "")

        ids = self._ids(messages)
        is_sampling = self.temperature > 0
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=is_sampling,
            eos_token_id=turn_ends(self.model, self.tokenizer) or None,
            pad_token_id=PADDING,
            stop_strings=None if stop is None else [stop],
            **({"temperature": self.temperature, "top_k": SAMPLED_FROM} if is_sampling else {}),
        )
        options: dict[str, Any] = {"attention_mask": ids.new_ones(ids.shape), "tokenizer": self.tokenizer}
        streamer = Shown(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            generate(self.model, ids, config, streamer=streamer, **options)
        except KeyboardInterrupt:
            write("")
        return "".join(pieces).strip()

    def _ids(self, messages: list[dict[str, str]]) -> Any:
        import torch

        from nemo_minitron.data.chat.rows import BadRow
        from nemo_minitron.hf.tokenizer import require_known_ids

        if self.template is None:
            found = self.tokenizer("\n".join(message["content"] for message in messages)).input_ids
            require_known_ids(found, self.vocab_size, self.tokenizer, str(self.tokenizer.name_or_path))
        else:
            try:
                found = self.template.ids(self.template.prompt(messages, self.attributes))
            except BadRow as reason:
                raise ConfigError(f"The dialogue cannot be written: {reason}", where="minitron chat") from reason
        return torch.tensor([found], device=self.model.device)


def _ask() -> str | None:
    """A line of the user; None at the end."""
    try:
        said = input("\n> ") if sys.stdin.isatty() else next(iter(sys.stdin.readline, ""), None)
    except (EOFError, KeyboardInterrupt):
        return None
    if said is None or said.strip() == EXIT:
        return None
    return said.rstrip("\n")
