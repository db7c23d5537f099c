"""Prune, train briefly and measure one candidate of a search."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import DivergenceError
from nemo_minitron.pruning.plan_file import PLAN_FILE
from nemo_minitron.pruning.possible import selection_for
from nemo_minitron.schema.pruning import Compensation
from nemo_minitron.schema.speed import SpeedMeasurement
from nemo_minitron.schema.training import Distillation, Training
from nemo_minitron.stages.artifacts import CandidateModel, Model, Scores, TeacherCheck, TokenizedText
from nemo_minitron.stages.common.compensation import RepairTexts, repair_model
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.common.scores import choose_plan
from nemo_minitron.stages.common.training import distill_student
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.search.expansion import search_of
from nemo_minitron.stages.search.params import CandidateStage

if TYPE_CHECKING:
    from nemo_minitron.families import ModelShape


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    teacher: Model
    data: TokenizedText
    scores: Scores | None = None
    check: TeacherCheck | None = None
    heldout: TokenizedText | None = None
    rivals: Mapping[str, CandidateModel] = field(default_factory=dict)


def candidate(params: CandidateStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write the trained candidate as a Hugging Face checkpoint; its losses are in nats per held-out token.

    In the first rung, the model is pruned with the scores of the search. A later rung continues from the weights of the
    candidate at its place in the ranking of the previous rung, with a new optimizer. A candidate that is too slow or
    diverges keeps the weights that it had before, and None as its loss.

    Raises:
        DataError: the models and the texts do not share a tokenizer.
    """
    _require_one_tokenizer(params, inputs, ctx)
    before = _facts_before(params, inputs, ctx)
    if ctx.is_main:
        shutil.copyfile(before["path"] / PLAN_FILE, ctx.out_dir / PLAN_FILE)
    if before["too_slow"] or before["diverged"]:
        return _untrained(before, ctx)
    student = Model(ctx.name, "prune", before["path"], "", {"license": inputs.model.license})
    training = {field: getattr(params.retraining, field) for field in Training.model_fields}
    # A later rung reads other samples than the rungs before.
    training["seed"] += params.rung - 1
    distillation = Distillation(num_steps=params.num_steps, **training)
    keys = f"stages.{search_of(ctx.name, params)}.retraining"
    try:
        trained = distill_student(distillation, student, inputs.teacher, inputs.data, ctx, keys=keys)
    except DivergenceError as error:
        _warn_of_divergence(error.what, keys, ctx)
        return _untrained({**before, "diverged": True}, ctx)
    if not ctx.is_main:
        return {}
    zero_shot = trained["initial_valid_loss"] if params.rung == 1 else before["zero_shot_loss"]
    loss = trained["final_valid_loss"]
    diverged = not math.isfinite(loss)
    if diverged:
        _warn_of_divergence(f"{ctx.name}: held-out loss {loss} after the last step.", keys, ctx)
    return {
        **_public(before),
        **trained,
        "diverged": diverged,
        "zero_shot_loss": zero_shot,
        "losses": [*before["losses"], None if diverged else loss],
    }


def _warn_of_divergence(what: str, keys: str, ctx: StageContext) -> None:
    ctx.progress.warn(
        f"{what} The candidate has no loss and is ranked last. Next: if others diverge as well, lower {keys}.lr or "
        f"raise {keys}.warmup_steps; after a change of {keys}.guard alone, --rerun {ctx.name} trains it again."
    )


def _untrained(before: Mapping[str, Any], ctx: StageContext) -> Result:
    """Publish the weights from before this rung, without a loss."""
    from nemo_minitron.hf.checkpoint import model_facts

    if not ctx.is_main:
        return {}
    shutil.copytree(before["path"], ctx.out_dir, dirs_exist_ok=True)
    facts = {**_public(before), **model_facts(ctx.out_dir)}
    return {**facts, "num_steps": 0, "losses": [*before["losses"], None]}


def _require_one_tokenizer(params: CandidateStage, inputs: Inputs, ctx: StageContext) -> None:
    """Check every text that the candidate reads before anything is computed; a candidate has its model's tokenizer."""
    texts = [inputs.data]
    if params.compensation is not None and inputs.heldout is not None:
        texts.append(inputs.heldout)
    for text in texts:
        require_one_tokenizer({"student": inputs.model, "teacher": inputs.teacher}, text, ctx)


def _public(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "path"}


def _facts_before(params: CandidateStage, inputs: Inputs, ctx: StageContext) -> dict[str, Any]:
    """Return the candidate's name, the folder of its weights, and its results before this rung."""
    if params.place is None:
        folder = ctx.work_dir / "pruned"
        rates = _cut_and_measure(params, inputs, ctx, folder)
        speed, limit = rates.get("generate_tokens_per_s"), params.min_generate_tokens_per_s
        too_slow = speed is not None and limit is not None and speed < limit
        if params.compensation is not None and not too_slow:
            folder = _repair(params.compensation, inputs, folder, ctx)
        return {
            "candidate": params.name,
            "path": folder,
            "generate_tokens_per_s": speed,
            "too_slow": too_slow,
            "diverged": False,
            "zero_shot_loss": None,
            "losses": [],
        }
    from nemo_minitron.pruning.search import ranking

    rivals = {stage: {"name": r.result["candidate"], **r.result} for stage, r in inputs.rivals.items()}
    chosen = ranking(list(rivals.values()))[params.place - 1]
    stage = next(stage for stage, facts in rivals.items() if facts["name"] == chosen["name"])
    kept = ("candidate", "generate_tokens_per_s", "too_slow", "diverged", "zero_shot_loss", "losses")
    return {"path": inputs.rivals[stage].path, **{key: chosen[key] for key in kept}}


def _repair(compensation: Compensation, inputs: Inputs, pruned: Path, ctx: StageContext) -> Path:
    """Repair the pruned model once, and return the folder of the repaired one."""
    folder, session = ctx.work_dir / "repaired", ctx.open_session
    # The first rank decides for all: another node may see its folder later.
    if not session.gather(folder.is_dir())[0]:
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        texts = RepairTexts(inputs.data, inputs.heldout or inputs.data)
        repair_model(compensation, inputs.model.path, pruned, pruned, texts, ctx, partial)
        if ctx.is_main:
            shutil.copyfile(pruned / PLAN_FILE, partial / PLAN_FILE)
            os.replace(partial, folder)
        session.barrier()
    return folder


def _cut_and_measure(params: CandidateStage, inputs: Inputs, ctx: StageContext, folder: Path) -> Mapping[str, float]:
    """Prune the model into `folder` once and, if the recipe requests it, time it. Rank 0 works; the others wait."""
    rates = ctx.work_dir / "speed.json"
    with ctx.open_session.main_works():
        if ctx.is_main and not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _cut(params, inputs, ctx, partial)
            os.replace(partial, folder)
        if ctx.is_main and params.measure_speed is not None and not rates.is_file():
            rates.write_text(json.dumps(_speed(params.measure_speed, folder, ctx)))
    found: dict[str, float] = json.loads(rates.read_text()) if rates.is_file() else {}
    return found


def _cut(params: CandidateStage, inputs: Inputs, ctx: StageContext, folder: Path) -> ModelShape:
    from nemo_minitron.pruning.plan_file import write_plan
    from nemo_minitron.pruning.slicing import prune_checkpoint

    rules = selection_for(params.selection, params.target, inputs.model.shape)
    key = f"stages.{search_of(ctx.name, params)}"
    plan = choose_plan(rules, inputs.model, inputs.scores, key)
    write_plan(plan, inputs.model.shape, folder)
    return prune_checkpoint(inputs.model.path, plan, folder, ctx.progress)


def _speed(params: SpeedMeasurement, folder: Path, ctx: StageContext) -> Mapping[str, float]:
    from nemo_minitron.evaluation.agreement import load_compared
    from nemo_minitron.evaluation.speed import measure_speed

    session = ctx.open_session
    model = load_compared(folder, params.precision, str(session.device), memory=ctx.logits_memory, session=session)
    return measure_speed(
        {"candidate": model},
        prompt_tokens=params.prompt_tokens,
        new_tokens=params.new_tokens,
        rounds=params.rounds,
        tick=lambda: None,
    )["candidate"]
