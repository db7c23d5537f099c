"""The kind of stage that counts letters."""

from __future__ import annotations

from collections.abc import Iterator

from minitron_letters.params import CountLettersStage
from nemo_minitron.stages.kind import Output, RecipeView, StageKind


def _problems(name: str, params: CountLettersStage, view: RecipeView) -> Iterator[str]:
    if params.letter.isdigit():
        yield f"stages.{name}.letter = {params.letter}: is a digit. Allowed: a letter."


COUNT_LETTERS = StageKind(
    name="count_letters",
    params=CountLettersStage,
    run="minitron_letters.run:count_letters",
    inputs={"model": (Output.MODEL,)},
    distributed=True,
    problems=_problems,
    result_tokens=lambda result: result["num_tokens"],
)
