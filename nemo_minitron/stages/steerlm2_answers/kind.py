"""The kind of stage that samples answers for SteerLM 2.0."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.schema.alignment import RewardTraining
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, StageKind
from nemo_minitron.stages.steerlm2_answers.params import Steerlm2AnswersStage


def _problems(name: str, params: Steerlm2AnswersStage, view: RecipeView) -> Iterator[str]:
    key, inputs = f"stages.{name}", params.inputs
    held = view.chat_rows(inputs.chats)
    if held is not None and held.rows == "pairs":
        yield f"{key}.inputs.chats: stage {inputs.chats} has pairs, and steerlm2_answers needs conversations."
    if held is not None and held.valid_rows == 0:
        yield f"{key}.inputs.chats: stage {inputs.chats} has valid_rows = 0, and held-out prompts are needed."
    rates = view.stages.get(inputs.attribute_model)
    if isinstance(rates, RewardTraining) and rates.reward != "regression":
        used = f"stage {inputs.attribute_model} has reward = {rates.reward}"
        yield f"{key}.inputs.attribute_model: {used}, and steerlm2_answers needs regression."
    if params.max_new_tokens >= params.max_seq_len_tokens:
        yield f"{key}.max_new_tokens = {params.max_new_tokens}: leaves no tokens of max_seq_len_tokens for a prompt."
    yield from _shape_problems(key, params, view)


def _shape_problems(key: str, params: Steerlm2AnswersStage, view: RecipeView) -> Iterator[str]:
    shapes = {role: view.shape(getattr(params.inputs, role)) for role in ("model", "reference")}
    rates = view.stages.get(params.inputs.attribute_model)
    rating = view.shape(rates.inputs.model) if isinstance(rates, RewardTraining) else None
    for role, shape in {**shapes, "attribute_model": rating}.items():
        if shape is not None and params.max_seq_len_tokens > shape.max_position_embeddings:
            yield (
                f"{key}.max_seq_len_tokens = {params.max_seq_len_tokens}: the model of inputs.{role} has "
                f"{shape.max_position_embeddings} positions."
            )
    one, other = shapes.values()
    if one is not None and other is not None and one.vocab_size != other.vocab_size:
        yield (
            f"{key}.inputs: the vocabulary of model has {one.vocab_size} tokens, that of reference {other.vocab_size}."
        )


STEERLM2_ANSWERS = StageKind(
    name="steerlm2_answers",
    params=Steerlm2AnswersStage,
    run="nemo_minitron.stages.steerlm2_answers.run:steerlm2_answers",
    outputs=(Output.SAMPLED_ANSWERS,),
    inputs={
        "model": MODELS,
        "reference": MODELS,
        "attribute_model": (Output.REWARD_MODEL,),
        "chats": (Output.CHAT_ROWS,),
    },
    one_gpu=True,
    needs_aligner=True,
    report="sampled_answers",
    problems=_problems,
)
