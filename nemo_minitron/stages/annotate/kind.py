"""The kind of stage that lets an attribute model rate answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_minitron.schema.alignment import RewardTraining
from nemo_minitron.schema.chats import ChatRowFacts
from nemo_minitron.stages.annotate.params import AnnotateStage
from nemo_minitron.stages.kind import Output, RecipeView, StageKind


def _chat_rows(name: str, params: AnnotateStage, view: RecipeView) -> ChatRowFacts | None:
    held = view.chat_rows(params.inputs.chats)
    return None if held is None else replace(held, rated_from=params.inputs.chats)


def _problems(name: str, params: AnnotateStage, view: RecipeView) -> Iterator[str]:
    held = view.chat_rows(params.inputs.chats)
    if held is not None and held.rows != "conversations":
        has = f"stage {params.inputs.chats} has {held.rows}"
        yield f"stages.{name}.inputs.chats: {has}, and annotate needs conversations."
    model = view.stages.get(params.inputs.attribute_model)
    if not isinstance(model, RewardTraining):
        return
    if model.reward != "regression":
        used = f"stage {params.inputs.attribute_model} has reward = {model.reward}"
        yield f"stages.{name}.inputs.attribute_model: {used}, and annotate needs regression."
    shape = view.shape(model.inputs.model)
    longest = params.max_seq_len_tokens
    if shape is not None and longest > (most := shape.max_position_embeddings):
        yield f"stages.{name}.max_seq_len_tokens = {longest}: the attribute model has {most} positions."


ANNOTATE = StageKind(
    name="annotate",
    params=AnnotateStage,
    run="nemo_minitron.stages.annotate.run:annotate",
    outputs=(Output.CHAT_ROWS,),
    inputs={"attribute_model": (Output.REWARD_MODEL,), "chats": (Output.CHAT_ROWS,)},
    one_gpu=True,
    needs_aligner=True,
    chat_rows=_chat_rows,
    rated_rows=lambda params: params.inputs.chats,
    problems=_problems,
)
