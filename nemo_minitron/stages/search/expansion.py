"""Expansion of a search into one stage for each candidate and rung, which run, resume and queue separately."""

from __future__ import annotations

from nemo_minitron.errors import PlanError, error_context
from nemo_minitron.families import ModelShape
from nemo_minitron.pruning.search import Candidate, enumerate_candidates
from nemo_minitron.stages.search.params import CandidateInputs, CandidateStage, SearchStage


def search_of(name: str, stage: CandidateStage) -> str:
    """Return the name of the search that a candidate's stage belongs to."""
    own = _first_rung(stage.name) if stage.name is not None else _later_rung(stage.rung, stage.place)
    return name.removesuffix(own)


def _first_rung(candidate: str) -> str:
    return f"_{candidate}"


def _later_rung(rung: int, place: int | None) -> str:
    return f"_r{rung}_p{place}"


def points_of(search: str, stage: SearchStage, source: ModelShape) -> list[Candidate]:
    """Return the points of the grid that meet the constraints, for a model of shape `source`.

    Raises:
        PlanError: there is none, or there are too many.
    """
    with error_context(PlanError, where=f"stages.{search}"):
        return enumerate_candidates(stage.grid, stage.constraints, source)


def candidate_stages(search: str, stage: SearchStage, source: ModelShape) -> dict[str, CandidateStage]:
    """Return stage name -> candidate stage, for every candidate and rung of a search over a model of shape `source`."""
    candidates = points_of(search, stage, source)
    out = {
        search + _first_rung(candidate.name): _candidate(stage, 1, name=candidate.name, target=candidate.target)
        for candidate in candidates
    }
    rivals = tuple(out)
    for number in range(2, len(stage.rungs) + 1):
        keep = stage.rungs[number - 2].keep or max(1, len(rivals) // 2)
        places = range(1, min(keep, len(rivals)) + 1)
        rung = {search + _later_rung(number, place): _candidate(stage, number, rivals, place=place) for place in places}
        out |= rung
        rivals = tuple(rung)
    return out


def _candidate(stage: SearchStage, rung: int, rivals: tuple[str, ...] = (), **which: object) -> CandidateStage:
    inputs = stage.inputs
    return CandidateStage.model_validate(
        {
            "kind": "candidate",
            "inputs": CandidateInputs(
                model=inputs.model,
                teacher=inputs.teacher,
                scores=inputs.scores,
                data=inputs.data,
                check=inputs.check,
                heldout=inputs.heldout,
                rivals=rivals,
            ),
            "rung": rung,
            "num_steps": stage.rungs[rung - 1].num_steps,
            "retraining": stage.retraining,
            "selection": stage.selection,
            "min_generate_tokens_per_s": stage.constraints.min_generate_tokens_per_s,
            "measure_speed": stage.measure_speed if rung == 1 else None,
            "compensation": stage.compensation if rung == 1 else None,
            **which,
        }
    )
