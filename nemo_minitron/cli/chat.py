"""`minitron chat`: a dialogue with a finished model in the terminal."""

from __future__ import annotations

import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, get_args

import typer

from nemo_minitron.cli.output import console
from nemo_minitron.errors import ArtifactError, ConfigError
from nemo_minitron.system.terminal import write

RESET, EXIT = "/reset", "/exit"


def chat(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_FOLDER", help="A run's folder, or a Hugging Face folder.")],
    attributes: Annotated[
        str | None, typer.Option(help="For an attribute-conditioned model: helpfulness=4,verbosity=1")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    once: Annotated[str | None, typer.Option(help="Answer this and exit.")] = None,
    date: Annotated[
        str | None, typer.Option(help="Date that the chat template inserts, YYYY-MM-DD; today unless given.")
    ] = None,
) -> None:
    """Chat with a finished model. /reset clears the dialogue, /exit or Ctrl-D ends it."""
    from nemo_minitron.data.chat.purity import parse_day
    from nemo_minitron.evaluation.chat_model import ChatModel

    folder = find_model(model)
    values = parse_attributes(attributes)
    day = datetime.now().date() if date is None else parse_day(date, "--date")
    loaded = ChatModel(folder, values, max_new_tokens, temperature, day, warn=_warn_no_template)
    before = [{"role": "system", "content": system}] if system else []
    if once is not None:
        loaded.answer([*before, {"role": "user", "content": once}], _show)
        return
    console.say(f"{RESET} clears, {EXIT} ends", f"{folder} ·", "dim")
    messages = list(before)
    while (line := _read_line()) is not None:
        if line == RESET:
            messages = list(before)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": loaded.answer(messages, _show)})


def names_of_models() -> list[str]:
    """Return the usual names of the stages whose model a chat can use, the most finished one first."""
    from nemo_minitron.stages.registry import STAGES

    ranked = [kind for kind in STAGES.values() if kind.chat_rank is not None]
    return [kind.name for kind in sorted(ranked, key=lambda kind: -(kind.chat_rank or 0))]


def find_model(path: Path) -> Path:
    """Return the folder with config.json: the path itself, or the last model that a run has published.

    Raises:
        ArtifactError: there is no model.
    """
    if (path / "config.json").is_file():
        return path
    names = names_of_models()
    found = [path / name for name in names if (path / name / "config.json").is_file()]
    if not found:
        raise ArtifactError(
            "No finished model is here.",
            where=str(path),
            allowed=f"a Hugging Face folder, or a run's folder with one of {', '.join(names)}",
            next_step="minitron status RECIPE shows what has finished.",
        )
    return found[0]


def parse_attributes(text: str | None) -> dict[str, float]:
    """Parse `helpfulness=4,verbosity=1`.

    Raises:
        ConfigError: an unknown attribute, or a value that is not a number from 0 to 4.
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


def _warn_no_template(text: str) -> None:
    console.say(text, "no chat template:", "yellow")


def _show(text: str, is_last: bool) -> None:
    write(text, end="\n" if is_last else "")


def _read_line() -> str | None:
    """Return a line of the user; None at the end of the dialogue."""
    try:
        line = input("\n> ") if sys.stdin.isatty() else next(iter(sys.stdin.readline, ""), None)
    except (EOFError, KeyboardInterrupt):
        return None
    if line is None or line.strip() == EXIT:
        return None
    return line.rstrip("\n")
