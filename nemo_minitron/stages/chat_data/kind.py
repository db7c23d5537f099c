"""The kind of stage that reads chat, preference and rating files."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.data.chat.formats import FORMATS_OF
from nemo_minitron.schema.chats import ChatRowFacts
from nemo_minitron.stages.chat_data.params import ChatDataStage
from nemo_minitron.stages.kind import Output, RecipeView, Source, StageKind


def _sources(params: ChatDataStage) -> Iterator[Source]:
    for number, chats in enumerate(params.sources):
        yield Source(f"sources.{number}.source", chats.source, "chats")


def _chat_rows(name: str, params: ChatDataStage, view: RecipeView) -> ChatRowFacts:
    return ChatRowFacts(params.rows, params.valid_rows)


def _problems(name: str, params: ChatDataStage, view: RecipeView) -> Iterator[str]:
    """Check that every source has a format with the kind of rows that the stage makes."""
    allowed = FORMATS_OF[params.rows]
    for number, source in enumerate(params.sources):
        if source.format not in ("auto", *allowed):
            yield (
                f"stages.{name}.sources.{number}.format = {source.format}: contains no {params.rows}. "
                f"Allowed with rows = {params.rows}: auto, {', '.join(allowed)}."
            )


CHAT_DATA = StageKind(
    name="chat_data",
    params=ChatDataStage,
    run="nemo_minitron.stages.chat_data.run:chat_data",
    version=3,
    outputs=(Output.CHAT_ROWS,),
    sources=_sources,
    chat_rows=_chat_rows,
    problems=_problems,
)
