"""The kinds of stage that an alignment backend trains: fine-tuning, preferences, attribute models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_minitron.backends.alignment.base import Method
from nemo_minitron.backends.alignment.rules import (
    CHAT_SEQ_MULTIPLE,
    model_problems,
    option_problems,
    row_problems,
    sequence_problems,
    size_problems,
    step_problems,
)
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.answers import AnswerSampling
from nemo_minitron.schema.chats import RowKind
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.align.params import AttributeModelStage, DpoStage, SftStage, Steerlm2Stage, SteerlmSftStage
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, StageKind
from nemo_minitron.workload.load import Load, alignment_load

AlignStage = SftStage | SteerlmSftStage | DpoStage | AttributeModelStage


def _shape(name: str, params: AlignStage | Steerlm2Stage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.model)


def _method(params: AlignStage) -> Method:
    if isinstance(params, DpoStage):
        return "dpo"
    return "reward_model" if isinstance(params, AttributeModelStage) else "sft"


def _needed_rows(params: AlignStage) -> RowKind:
    ranks = isinstance(params, AttributeModelStage) and params.reward == "ranking"
    return "pairs" if ranks or isinstance(params, DpoStage) else "conversations"


def _problems(name: str, params: AlignStage, view: RecipeView) -> Iterator[str]:
    key, chats, layout = f"stages.{name}", params.inputs.chats, view.layout(name)
    yield from option_problems(key, params, _method(params))
    yield from row_problems(key, params, chats, view.chat_rows(chats), _needed_rows(params))
    if isinstance(params, SteerlmSftStage) and not params.condition_on_attributes:
        yield f"{key}.condition_on_attributes = false: then it is an ordinary sft stage."
    yield from size_problems(key, params, layout)
    if not isinstance(params, DpoStage):  # NeMo-Aligner pads pairs to a multiple of tp
        # A reward model's sequences are padded to the maximum length.
        padded_to = None if isinstance(params, AttributeModelStage) else CHAT_SEQ_MULTIPLE
        yield from sequence_problems(key, params.max_seq_len_tokens, layout, padded_to)
    yield from model_problems(key, view.shape(params.inputs.model), layout)


def _load(name: str, params: AlignStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape = view.shape(params.inputs.model)
    if shape is None or params.num_steps is None:
        return None
    return alignment_load(
        shape,
        params.num_steps,
        params.global_batch_size,
        params.max_seq_len_tokens,
        layout,
        answers_per_row=2 if _needed_rows(params) == "pairs" else 1,
        has_reference=isinstance(params, DpoStage),
    )


def _steerlm2_problems(name: str, params: Steerlm2Stage, view: RecipeView) -> Iterator[str]:
    key, layout = f"stages.{name}", view.layout(name)
    yield from option_problems(key, params, "steerlm2")
    if params.global_batch_size % layout.dp:
        yield f"{key}.global_batch_size = {params.global_batch_size}: not a multiple of dp = {layout.dp}."
    sampling = view.stages.get(params.inputs.answers)
    if isinstance(sampling, AnswerSampling):
        yield from _sampling_problems(key, params, sampling, layout)
    yield from step_problems(key, params)
    yield from sequence_problems(key, params.max_seq_len_tokens, layout, CHAT_SEQ_MULTIPLE)
    yield from model_problems(key, view.shape(params.inputs.model), layout)


def _sampling_problems(key: str, params: Steerlm2Stage, sampling: AnswerSampling, layout: Parallel) -> Iterator[str]:
    """Yield conflicts with the stage that samples the answers."""
    answers = params.global_batch_size // layout.dp * sampling.answers_per_prompt
    if answers % layout.micro_batch_size:
        yield (
            f"{key}: micro_batch_size = {layout.micro_batch_size} counts answers here, and does not divide those of a "
            f"batch on one rank, global_batch_size / dp * answers_per_prompt = {answers}."
        )
    for part, most in (("train", sampling.max_train_prompts), ("valid", sampling.max_valid_prompts)):
        if most is not None and most < params.global_batch_size:
            yield (
                f"{key}.global_batch_size = {params.global_batch_size}: stage {params.inputs.answers} has "
                f"max_{part}_prompts = {most}."
            )
    if sampling.max_seq_len_tokens > params.max_seq_len_tokens:
        yield (
            f"{key}.max_seq_len_tokens = {params.max_seq_len_tokens}: stage {params.inputs.answers} has "
            f"{sampling.max_seq_len_tokens}, and its answers would be cut off."
        )


def _steerlm2_load(name: str, params: Steerlm2Stage, layout: Parallel, view: RecipeView) -> Load | None:
    """Estimate the training; the forward pass that computes the weights of the answers is not counted."""
    shape, sampling = view.shape(params.inputs.model), view.stages.get(params.inputs.answers)
    if shape is None or params.num_steps is None or not isinstance(sampling, AnswerSampling):
        return None
    answers = params.global_batch_size * sampling.answers_per_prompt
    return alignment_load(shape, params.num_steps, answers, params.max_seq_len_tokens, layout)


SFT = StageKind(
    name="sft",
    params=SftStage,
    run="nemo_minitron.stages.align.run:sft",
    outputs=(Output.MODEL,),
    inputs={"model": MODELS, "chats": (Output.CHAT_ROWS,)},
    starts_ranks=True,
    needs_aligner=True,
    whole_sequences=True,
    trains=True,
    report="alignment",
    chat_rank=5,
    version=2,
    shape=_shape,
    problems=_problems,
    load=_load,
)
STEERLM_SFT = replace(SFT, name="steerlm_sft", params=SteerlmSftStage, chat_rank=6)
STEERLM2 = replace(
    SFT,
    name="steerlm2",
    params=Steerlm2Stage,
    run="nemo_minitron.stages.align.run:steerlm2",
    inputs={"model": MODELS, "answers": (Output.SAMPLED_ANSWERS,)},
    chat_rank=9,
    problems=_steerlm2_problems,
    load=_steerlm2_load,
)
DPO = replace(SFT, name="dpo", params=DpoStage, run="nemo_minitron.stages.align.run:dpo", chat_rank=7)
TRAIN_ATTRIBUTE_MODEL = replace(
    SFT,
    name="train_attribute_model",
    params=AttributeModelStage,
    run="nemo_minitron.stages.align.run:train_attribute_model",
    outputs=(Output.REWARD_MODEL,),
    chat_rank=None,
    version=1,
    shape=lambda name, params, view: None,
)
