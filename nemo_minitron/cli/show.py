"""`minitron show`: rows of a chat_data stage, as data or as the text that a model is trained on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.text import Text

from nemo_minitron import api
from nemo_minitron.cli.arguments import Overrides, RecipeFile, expanded
from nemo_minitron.cli.output import console
from nemo_minitron.errors import ConfigError
from nemo_minitron.schema.base import TEMPLATE_DATE

if TYPE_CHECKING:
    from nemo_minitron.artifacts.types import Artifact
    from nemo_minitron.data.chat.tokenizing import ChatTemplate

PROMPT, ANSWER = "dim", "bold"


def show(
    recipe: RecipeFile,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A finished chat_data or annotate stage.")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows.")] = 3,
    split: Annotated[str, typer.Option(help="train or valid.")] = "train",
    model: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, help="A model folder: show the rendered text, prompt dim, answer (in the loss) bright."
        ),
    ] = None,
    template: Annotated[str, typer.Option(help="chatml, llama3, extra_id, or model: the folder's own.")] = "model",
    attributes: Annotated[bool, typer.Option(help="Render ratings before the last answer.")] = True,
    whole_markers: Annotated[bool, typer.Option(help="Refuse a tokenizer that splits markers into tokens.")] = True,
    template_date: Annotated[str, typer.Option(help="Date that a template inserts.")] = TEMPLATE_DATE.isoformat(),
) -> None:
    """Show rows of a finished chat_data or annotate stage, or with --model the exact training text and its tokens."""
    from nemo_minitron.data.chat.purity import parse_day
    from nemo_minitron.data.chat.render import read_normalized
    from nemo_minitron.data.chat.tokenizing import ChatTemplate
    from nemo_minitron.schema.chats import TemplateName

    _require_one_of("--split", split, ("train", "valid"))
    _require_one_of("--template", template, get_args(TemplateName))
    found = list(islice(read_normalized(_artifact(recipe, stage, overrides).path / f"{split}.jsonl"), rows))
    bound = None
    if model is not None:
        day = parse_day(template_date, "--template-date")
        bound = ChatTemplate.load(model, cast(TemplateName, template), whole_markers=whole_markers, day=day)
    for row in found:
        console.rule(row["origin"], align="left")
        for text in _data(row) if bound is None else _rendered(row, bound, attributes=attributes):
            console.print(text, soft_wrap=True)


def _require_one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option} {value} is unknown.", where="minitron show", allowed=", ".join(allowed))


def _artifact(recipe: Path, stage: str, overrides: list[str] | None) -> Artifact:
    from nemo_minitron.artifacts.store import Store
    from nemo_minitron.plan.folder import run_dir
    from nemo_minitron.stages.kind import Output
    from nemo_minitron.stages.registry import kinds_with

    loaded = api.load_recipe(recipe, overrides)
    kinds = kinds_with(Output.CHAT_ROWS)
    names = [name for name, config in loaded.stages.items() if config.kind in kinds]
    if stage not in names:
        raise ConfigError(
            f"{stage} is not a {' or '.join(kinds)} stage of this recipe.",
            where=str(recipe),
            allowed=", ".join(names) or "none: the recipe has no such stage",
        )
    store = Store(run_dir(loaded))
    if store.manifest(stage) is None:
        raise ConfigError(
            f"Stage {stage} has not finished.",
            where=str(store.published(stage)),
            next_step=f"minitron run {recipe} --until {stage}",
        )
    return store.artifact(stage, "unverified")


def _data(row: dict[str, Any]) -> list[Text]:
    """Return the messages by role, then their ratings."""
    out = []
    for message in row.get("messages") or row["prompt"]:
        out += [_labeled("reasoning", message["reasoning_content"])] if "reasoning_content" in message else []
        out.append(_labeled(message["role"], message["content"]))
    out += [_labeled(key, row[key]) for key in ("chosen", "rejected") if key in row]
    rest = {key: row[key] for key in ("attributes", "chosen_reward", "rejected_reward") if key in row}
    return [*out, Text(json.dumps(rest))] if rest else out


def _labeled(label: str, text: str) -> Text:
    return Text.assemble((f"{label}: ", "cyan"), text)


def _rendered(row: dict[str, Any], template: ChatTemplate, *, attributes: bool) -> list[Text]:
    """Return the text of each training row: the prompt, the answers after it, and their numbers of tokens."""
    from nemo_minitron.data.chat.render import pair_row, sft_rows
    from nemo_minitron.data.chat.rows import BadRow
    from nemo_minitron.schema.chats import ChatRendering

    try:
        if "messages" in row:
            options = ChatRendering(condition_on_attributes=attributes)
            texts = [(found["input"], {"answer": found["output"]}) for found in sft_rows(row, template, options)]
        else:
            pair = cast(dict[str, Any], pair_row(row, template))
            responses = {name: pair[f"{name}_response"] for name in ("chosen", "rejected")}
            texts = [(pair["prompt"], responses)]
    except BadRow as reason:
        return [Text(f"unusable with this template: {reason}", "red")]
    return [text for prompt, answers in texts for text in _colored(prompt, answers, template)]


def _colored(prompt: str, answers: dict[str, str], template: ChatTemplate) -> list[Text]:
    out = []
    for number, (name, answer) in enumerate(answers.items()):
        prompt_tokens, answer_tokens = template.require_boundary(prompt, answer)
        before = prompt if number == 0 else ""
        out.append(Text.assemble((before, PROMPT), (answer, ANSWER)))
        counts = f"[{name}: {prompt_tokens} tokens of prompt, {answer_tokens} with loss]"
        out.append(Text(counts, "cyan"))
    return out
