"""The kinds of stage that an alignment backend trains: fine-tuning, preferences, attribute models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_minitron.backends.alignment.base import Method
from nemo_minitron.backends.alignment.rules import model_problems, option_problems, row_problems, size_problems
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.chats import RowKind
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.align.params import AttributeModelStage, DpoStage, SftStage, SteerlmSftStage
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, StageKind
from nemo_minitron.workload.load import Load, alignment_load

AlignStage = SftStage | SteerlmSftStage | DpoStage | AttributeModelStage


def _shape(name: str, params: AlignStage, view: RecipeView) -> ModelShape | None:
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
    yield from model_problems(key, view.shape(params.inputs.model), layout)


def _load(name: str, params: AlignStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape = view.shape(params.inputs.model)
    if shape is None or params.num_steps is None:
        return None
    pairs = isinstance(params, DpoStage)
    return alignment_load(
        shape, params.num_steps, params.global_batch_size, params.max_seq_len_tokens, layout, pairs=pairs
    )


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
    shape=_shape,
    problems=_problems,
    load=_load,
)
STEERLM_SFT = replace(SFT, name="steerlm_sft", params=SteerlmSftStage, chat_rank=6)
DPO = replace(SFT, name="dpo", params=DpoStage, run="nemo_minitron.stages.align.run:dpo", chat_rank=7)
TRAIN_ATTRIBUTE_MODEL = replace(
    SFT,
    name="train_attribute_model",
    params=AttributeModelStage,
    run="nemo_minitron.stages.align.run:train_attribute_model",
    outputs=(Output.REWARD_MODEL,),
    chat_rank=None,
    shape=lambda name, params, view: None,
)
