"""The kind of stage that repairs a pruned model in closed form."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import SelectionRules
from nemo_minitron.stages.common.plan_rules import plan_problems
from nemo_minitron.stages.common.repair_rules import calibration_problems, merged_head_problems, widest_input
from nemo_minitron.stages.compensate.params import CompensateStage
from nemo_minitron.stages.kind import MODELS, HeldoutUse, Output, RecipeView, StageKind
from nemo_minitron.workload.load import Load, forward_load


def _problems(name: str, params: CompensateStage, view: RecipeView) -> Iterator[str]:
    key = f"stages.{name}"
    if params.inputs.heldout == params.inputs.data:
        yield f"{key}.inputs.heldout: the same as inputs.data. Next: remove the key, or name a stage with other text."
    yield from plan_problems(name, params.inputs.plan, params.inputs.teacher, params.inputs.student, view)
    target = view.shape(params.inputs.student)
    if target is None:
        return
    yield from calibration_problems(key, params.num_samples * params.seq_len_tokens, widest_input(target))
    plan = view.stages.get(params.inputs.plan)
    if isinstance(plan, SelectionRules):
        yield from merged_head_problems(key, params, plan, view.shape(params.inputs.teacher), target)


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
)
