"""Rank the candidates of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.errors import DivergenceError, MinitronError, PlanError
from nemo_minitron.stages.artifacts import CandidateModel, Model, Scores, TeacherCheck, TokenizedText
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.search.expansion import points_of
from nemo_minitron.stages.search.params import SearchStage

_MEASURED = ("zero_shot_loss", "losses", "generate_tokens_per_s", "diverged")


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    candidates: Mapping[str, CandidateModel]
    teacher: Model | None = None
    scores: Scores | None = None
    data: TokenizedText | None = None
    check: TeacherCheck | None = None
    heldout: TokenizedText | None = None


def search(params: SearchStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write search.json: every candidate with its sizes, costs and losses, best first. No model is trained here.

    Raises:
        PlanError: all candidates are slower than the constraint.
        DivergenceError: those that are not have diverged.
    """
    from nemo_minitron.pruning.search import kendall_tau, ranking, write_search

    source = inputs.model.shape
    points = points_of(ctx.name, params, source)
    trained = _newest(inputs)
    ranked = ranking([{**point.facts(), **{key: trained[point.name][key] for key in _MEASURED}} for point in points])
    compared = [found for found in ranked if None not in (found["zero_shot_loss"], found["losses"][-1])]
    tau = kendall_tau([found["zero_shot_loss"] for found in compared], [float(found["rank"]) for found in compared])
    best = ranked[0]
    if best["losses"][-1] is None:
        raise _no_winner(ctx.name, ranked)
    write_search(
        {
            "constraints": params.constraints.model_dump(mode="json"),
            "rungs": _rungs(params, inputs),
            "candidates": ranked,
            "winner": best["name"],
            "rank_correlation": tau,
        },
        ctx.out_dir,
    )
    ctx.progress.say(f"winner: {best['name']}, {best['num_params']:,} parameters, loss {best['losses'][-1]}")
    return {"winner": best["name"], "num_candidates": len(ranked), "num_params": best["num_params"]}


def _no_winner(search: str, ranked: Sequence[Mapping[str, Any]]) -> MinitronError:
    num_diverged = sum(found["diverged"] for found in ranked)
    if num_diverged:
        slow = "" if num_diverged == len(ranked) else "; the others are slower than min_generate_tokens_per_s"
        return DivergenceError(
            f"{num_diverged} of {len(ranked)} candidates diverged{slow}, so there is no winner.",
            where=f"stages.{search}.retraining",
            next_step="Lower lr, or raise warmup_steps.",
        )
    return PlanError(
        "Every candidate is slower than min_generate_tokens_per_s, so none was trained.",
        where=f"stages.{search}.constraints.min_generate_tokens_per_s",
        allowed=f"at most {max(found['generate_tokens_per_s'] for found in ranked):.1f}, the fastest candidate",
        next_step="Lower it, or add smaller sizes to the grid.",
    )


def _newest(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Return candidate -> its result in the last rung in which it was trained."""
    found: dict[str, dict[str, Any]] = {}
    for artifact in inputs.candidates.values():
        result = dict(artifact.result)
        known = found.get(result["candidate"])
        if known is None or len(known["losses"]) < len(result["losses"]):
            found[result["candidate"]] = result
    return found


def _rungs(params: SearchStage, inputs: Inputs) -> list[dict[str, Any]]:
    def candidates_of(rung: int) -> list[Artifact]:
        return [a for a in inputs.candidates.values() if len(a.losses) == rung]

    tokens = params.retraining.global_batch_size * params.retraining.seq_len_tokens
    return [
        {
            "num_steps": rung.num_steps,
            "num_candidates": len(candidates_of(number)),
            "tokens_each": rung.num_steps * tokens,
        }
        for number, rung in enumerate(params.rungs, 1)
    ]
