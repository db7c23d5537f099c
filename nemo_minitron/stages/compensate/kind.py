"""The kind of stage that repairs a pruned model in closed form."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.pruning.repairable import repaired_sites
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import SelectionRules
from nemo_minitron.stages.common.plan_rules import plan_problems
from nemo_minitron.stages.common.repair_rules import (
    calibration_problems,
    merged_head_problems,
    site_problems,
    widest_input,
)
from nemo_minitron.stages.compensate.params import CompensateStage
from nemo_minitron.stages.kind import MODELS, HeldoutUse, Output, RecipeView, StageKind, calibration_text
from nemo_minitron.workload.layer_by_layer import repair_load, written_bytes
from nemo_minitron.workload.load import Load


def _problems(name: str, params: CompensateStage, view: RecipeView) -> Iterator[str]:
    key = f"stages.{name}"
    if params.inputs.heldout == params.inputs.data:
        yield f"{key}.inputs.heldout: the same as inputs.data. Next: remove the key, or name a stage with other text."
    yield from plan_problems(name, params.inputs.plan, params.inputs.teacher, params.inputs.student, view)
    source, target = view.shape(params.inputs.teacher), view.shape(params.inputs.student)
    if target is None:
        return
    yield from calibration_problems(key, params.num_samples * params.seq_len_tokens, widest_input(target))
    if source is not None:
        yield from site_problems(key, params, source, [target])
    plan = view.stages.get(params.inputs.plan)
    if isinstance(plan, SelectionRules):
        yield from merged_head_problems(key, params, plan, source, target)


def _shape(name: str, params: CompensateStage, view: RecipeView) -> ModelShape | None:
    return view.shape(params.inputs.student)


def _heldout_uses(params: CompensateStage) -> Iterator[HeldoutUse]:
    yield HeldoutUse(params.inputs.heldout or params.inputs.data, params.heldout_tokens, "heldout_tokens")


def _load(name: str, params: CompensateStage, layout: Parallel, view: RecipeView) -> Load | None:
    teacher, student = view.shape(params.inputs.teacher), view.shape(params.inputs.student)
    if teacher is None or student is None:
        return None
    return repair_load(teacher, student, params, repaired_sites(params, teacher, student), layout)


COMPENSATE = StageKind(
    name="compensate",
    params=CompensateStage,
    run="nemo_minitron.stages.compensate.run:compensate",
    version=2,
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
    text_use=calibration_text,
    heldout_uses=_heldout_uses,
    load=_load,
    disk_bytes=written_bytes,
)
