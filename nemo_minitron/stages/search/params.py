"""Keys of search stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.pruning import SelectionRules, Target
from nemo_minitron.schema.search import Rung, SearchConstraints, SearchGrid
from nemo_minitron.schema.speed import SpeedMeasurement
from nemo_minitron.schema.training import Training


class SearchInputs(Schema):
    model: StageName = "teacher"
    """What is cut."""
    teacher: StageName = "teacher"
    scores: StageName | None = "score"
    data: StageName = "data"
    check: StageName | None = "check_teacher"
    candidates: tuple[StageName, ...] = ()
    """Filled in by the planner: one stage for each candidate and rung."""


class SearchStage(StageParams):
    """Find the shape: every point of a grid that meets the constraints is cut from one set of scores, trained a
    little (2407.14679, section 2.3), and ranked by its held-out loss. `select` takes the winner's sizes.
    """

    kind: Literal["search"]
    inputs: SearchInputs = SearchInputs()
    grid: SearchGrid
    constraints: SearchConstraints = SearchConstraints()
    rungs: Annotated[tuple[Rung, ...], Field(min_length=1)] = (Rung(num_steps=400),)
    """400 steps: the papers' lightweight retraining; rankings change until about 300 (2407.14679, figure 9)."""
    retraining: Training
    selection: SelectionRules = SelectionRules()
    measure_speed: SpeedMeasurement | None = None


class CandidateInputs(Schema):
    model: StageName
    teacher: StageName
    scores: StageName | None = None
    data: StageName
    check: StageName | None = None
    rivals: tuple[StageName, ...] = ()
    """Candidates of the rung before."""


class CandidateStage(StageParams):
    """One candidate of a search in one rung. Written by the planner, not by people."""

    kind: Literal["candidate"]
    inputs: CandidateInputs
    rung: PositiveInt
    name: str | None = None
    """Of the grid's point; later rungs learn it from the ranking."""
    place: PositiveInt | None = None
    """Later rungs: which place of the ranking before goes on here."""
    target: Target = Target()
    num_steps: PositiveInt
    retraining: Training
    selection: SelectionRules
    min_generate_tokens_per_s: float | None = None
    measure_speed: SpeedMeasurement | None = None
