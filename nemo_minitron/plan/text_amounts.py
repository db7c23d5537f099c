"""Warnings about too little text, once its size is known: repeated training text, and short held-out parts."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from nemo_minitron.artifacts.store import Store
from nemo_minitron.data.used import MAX_USEFUL_EPOCHS, expected_use
from nemo_minitron.errors import ArtifactError
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.schema.base import StageParams
from nemo_minitron.stages.kind import HeldoutUse, TextUse
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.files import read_json


def text_warnings(plan: RunPlan) -> Iterator[str]:
    """Yield the warnings of `too_little_text` for all stages yet to run, as far as their text has been tokenized."""
    store = Store(run_dir(plan.recipe))
    finished = {name for name, state in plan.states.items() if state.status == "finished"}
    for name, stage in plan.recipe.stages.items():
        if name not in finished:
            yield from too_little_text(name, stage, store, finished)


def too_little_text(name: str, stage: StageParams, store: Store, finished: Container[str]) -> Iterator[str]:
    """Yield a line for each source that is repeated too often, for a repair with too little text, and for each short
    held-out part.

    Args:
        finished: names of the stages whose output is that of the recipe.

    Raises:
        ArtifactError: the facts of the tokenized text are damaged.
    """
    kind = STAGES[stage.kind]
    read = kind.text_use(stage)
    if read is not None and read.data in finished:
        warnings = _repeated if read.repeats_help else _repeated_in_vain
        yield from warnings(name, read, _sources(read.data, "train", store))
    for heldout in kind.heldout_uses(stage):
        if heldout.data in finished:
            yield from _short(name, heldout, _sources(heldout.data, "valid", store))


def _sources(data: str, part: str, store: Store) -> list[dict[str, Any]]:
    """Return the sources of a part of tokenized text; none if its file is missing, which the stage itself reports."""
    file = store.published(data) / "data.json"
    if not file.is_file():
        return []
    next_step = f"Create it again with --rerun {data}, or restore the file."
    facts = read_json(file, next_step)
    if not isinstance(facts, dict) or not isinstance(facts.get(part), list):
        raise ArtifactError(f"{file.name} does not list its sources.", where=str(file), next_step=next_step)
    return list(facts[part])


def _repeated(name: str, text: TextUse, sources: list[dict[str, Any]]) -> Iterator[str]:
    for use in expected_use(sources, text.num_tokens):
        if use["epochs"] > MAX_USEFUL_EPOCHS:
            yield (
                f"stages.{name}: {use['source']} will be read {use['epochs']:.1f} times, {use['tokens']:,.0f} tokens; "
                f"beyond {MAX_USEFUL_EPOCHS:g} epochs, repeated text adds less and less (arXiv:2305.16264). "
                f"Lower its weight in stages.{text.data}, lower num_steps, or add text."
            )


def _repeated_in_vain(name: str, text: TextUse, sources: list[dict[str, Any]]) -> Iterator[str]:
    uses = expected_use(sources, text.num_tokens)
    again = [use for use in uses if use["epochs"] > 1]
    if again:
        new = sum(use["tokens"] / max(1.0, use["epochs"]) for use in uses)
        named = ", ".join(f"{use['source']} will be read {use['epochs']:.1f} times" for use in again)
        yield (
            f"stages.{name}: of {text.num_tokens:,} calibration tokens (num_samples * seq_len_tokens), only {new:,.0f} "
            f"will be different text: {named}, and repeats add nothing to a least-squares fit. "
            f"Lower its weight in stages.{text.data}, lower num_samples, or add text."
        )


def _short(name: str, text: HeldoutUse, sources: list[dict[str, Any]]) -> Iterator[str]:
    found = sum(source["num_tokens"] for source in sources)
    if sources and found < text.num_tokens:
        yield (
            f"stages.{name}.{text.key} = {text.num_tokens}: the held-out part of stages.{text.data} has only "
            f"{found:,} tokens. The figures are less certain; raise valid_fraction there, or add text."
        )
