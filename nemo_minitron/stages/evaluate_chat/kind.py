"""The kind of stage that evaluates an aligned model on pairs or conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nemo_minitron.schema.alignment import Alignment
from nemo_minitron.schema.base import StageParams
from nemo_minitron.stages.evaluate_chat.params import EvaluateChatStage
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, Source, StageKind


def _sources(params: EvaluateChatStage) -> Iterator[Source]:
    if params.instructions is not None:
        yield Source("instructions", params.instructions, "chats")


def _problems(name: str, params: EvaluateChatStage, view: RecipeView) -> Iterator[str]:
    """Check that the chat rows support the measurements that the stage makes."""
    key, chats = f"stages.{name}", params.inputs.chats
    facts = view.chat_rows(chats)
    if facts is not None and facts.valid_rows == 0:
        yield f"{key}.inputs.chats: stage {chats} has valid_rows = 0, and the evaluation needs held-out rows."
    if facts is not None and facts.rows == "prompts":
        yield f"{key}.inputs.chats: stage {chats} has prompts; an evaluation needs conversations or pairs."
    elif facts is not None and facts.rows == "pairs":
        if params.num_generated:
            yield f"{key}.num_generated = {params.num_generated}: needs conversations, and stage {chats} has pairs."
    elif params.inputs.reference is not None and facts is not None:
        yield f"{key}.inputs.reference: needs pairs, and stage {chats} has conversations. Next: remove this key."
    if params.vary_attribute is not None and not params.num_generated:
        yield f"{key}.vary_attribute = {params.vary_attribute}: needs generated answers. Next: set num_generated."
    yield from _stricter_than_training(key, params, view.stages)


def _stricter_than_training(key: str, params: EvaluateChatStage, stages: Mapping[str, StageParams]) -> Iterator[str]:
    """Check that the evaluation tolerates the invalid rows that a training of its model may skip."""
    for name, trained in _trainings_before(params.inputs.model, stages):
        chats = params.inputs.chats
        same = trained.inputs.chats == chats  # type: ignore[attr-defined]
        if same and trained.max_bad_fraction > params.max_bad_fraction:
            yield (
                f"{key}.max_bad_fraction = {params.max_bad_fraction:g}: stage {name} may skip invalid rows up to a "
                f"fraction of {trained.max_bad_fraction:g} of {chats}, which would stop the evaluation. "
                f"Next: {key}.max_bad_fraction={trained.max_bad_fraction:g}."
            )


def _trainings_before(model: str, stages: Mapping[str, StageParams]) -> Iterator[tuple[str, Alignment]]:
    """Yield the alignment stages from which a model was made, the last one first."""
    seen: set[str] = set()
    while model in stages and model not in seen:
        seen.add(model)
        stage = stages[model]
        if isinstance(stage, Alignment):
            yield model, stage
        inputs = getattr(stage, "inputs", None)
        model = getattr(inputs, "model", None) or getattr(inputs, "student", None) or ""


EVALUATE_CHAT = StageKind(
    name="evaluate_chat",
    params=EvaluateChatStage,
    run="nemo_minitron.stages.evaluate_chat.run:evaluate_chat",
    version=3,
    outputs=(Output.CHAT_EVALUATION,),
    inputs={"model": MODELS, "chats": (Output.CHAT_ROWS,), "reference": MODELS},
    distributed=True,
    whole_layers=True,
    skips_long_rows=True,
    report="chat_evaluation",
    sources=_sources,
    problems=_problems,
    preflight="nemo_minitron.stages.evaluate_chat.preflight:preflight",
)
