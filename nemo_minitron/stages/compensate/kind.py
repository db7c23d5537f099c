"""The kind of stage that repairs a pruned model in closed form."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.common.plan_rules import plan_problems
from nemo_minitron.stages.compensate.params import CompensateStage
from nemo_minitron.stages.kind import MODELS, HeldoutUse, Output, RecipeView, Result, StageKind
from nemo_minitron.workload.load import Load, forward_load

TOKENS_PER_INPUT = 20
"""Calibration tokens that a repair needs for each input of a linear layer: with fewer, least squares fits noise. The
probe in docs/results.md worked with 21."""


def _problems(name: str, params: CompensateStage, view: RecipeView) -> Iterator[str]:
    key = f"stages.{name}"
    if params.inputs.heldout == params.inputs.data:
        yield f"{key}.inputs.heldout: the same as inputs.data. Next: remove the key, or name a stage with other text."
    yield from plan_problems(name, params.inputs.plan, params.inputs.student, view)
    target = view.shape(params.inputs.student)
    if target is None:
        return
    widest = max(target.hidden_size, target.ffn_hidden_size, target.num_attention_heads * target.kv_channels)
    tokens, needed = params.num_samples * params.seq_len_tokens, TOKENS_PER_INPUT * widest
    if tokens < needed:
        yield (
            f"{key}: {tokens} calibration tokens (num_samples * seq_len_tokens) are too few for a layer with {widest} "
            f"inputs. Allowed: at least {TOKENS_PER_INPUT} for each input, {needed}."
        )


def _shape(name: str, params: CompensateStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.student)


def _heldout_uses(params: CompensateStage) -> Iterator[HeldoutUse]:
    yield HeldoutUse(params.inputs.heldout or params.inputs.data, params.heldout_tokens, "heldout_tokens")


def _load(name: str, params: CompensateStage, layout: Parallel, view: RecipeView) -> Load | None:
    teacher = view.shape(params.inputs.teacher)
    if teacher is None:
        return None
    tokens = params.num_samples * params.seq_len_tokens + params.heldout_tokens
    return forward_load(teacher, tokens, params.seq_len_tokens, params.precision, layout)


def _result_tokens(result: Result) -> int:
    return int(result["num_tokens"])


COMPENSATE = StageKind(
    name="compensate",
    params=CompensateStage,
    run="nemo_minitron.stages.compensate.run:compensate",
    outputs=(Output.MODEL,),
    inputs={
        "teacher": MODELS,
        "student": MODELS,
        "plan": (Output.PRUNE_PLAN,),
        "data": (Output.TOKENIZED_TEXT,),
        "heldout": (Output.TOKENIZED_TEXT,),
    },
    distributed=True,
    whole_layers=True,
    whole_sequences=True,
    report="compensation",
    chat_rank=1,
    shape=_shape,
    problems=_problems,
    heldout_uses=_heldout_uses,
    load=_load,
    result_tokens=_result_tokens,
)
