"""Keys of search stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.pruning import Compensation, SelectionRules, Target
from nemo_minitron.schema.search import Rung, SearchConstraints, SearchGrid
from nemo_minitron.schema.speed import SpeedMeasurement
from nemo_minitron.schema.training import Training


class SearchInputs(Schema):
    """Stages that a search stage reads."""

    model: StageName = "teacher"
    """Stage that provides the model to prune."""
    teacher: StageName = "teacher"
    """Stage that provides the teacher of the candidates."""
    scores: StageName | None = "score"
    """Stage that provides the scores; used with `selection.method: importance` only."""
    data: StageName = "data"
    """Stage that provides the tokenized text."""
    check: StageName | None = "check_teacher"
    """Teacher check to wait for. null: none."""
    heldout: StageName | None = None
    """Stage that provides the held-out text of `compensation`. null: the held-out part of the data."""
    candidates: tuple[StageName, ...] = ()
    """Set by the planner: one stage for each candidate and rung."""


class SearchStage(StageParams):
    """Search for the best shape: prune every point of a grid that meets the constraints from one set of scores, train
    each a little (2407.14679, section 2.3), and rank them by held-out loss. A `select` stage takes the winner's sizes.
    """

    kind: Literal["search"]
    inputs: SearchInputs = SearchInputs()
    grid: SearchGrid
    """Sizes to try."""
    constraints: SearchConstraints = SearchConstraints()
    """Limits that every candidate must meet."""
    rungs: Annotated[tuple[Rung, ...], Field(min_length=1)] = (Rung(num_steps=400),)
    """Rounds of training. The papers' lightweight retraining takes 400 steps; rankings change until about step 300
    (2407.14679, figure 9)."""
    retraining: Training
    """How candidates are trained."""
    selection: SelectionRules = SelectionRules()
    """How the indices that stay are chosen."""
    measure_speed: SpeedMeasurement | None = None
    """Measure the generation speed of each candidate after pruning. null: do not."""
    compensation: Compensation | None = None
    """Repair each candidate by least squares after pruning. null: do not. It needs a layout with tp = pp = cp = 1."""


class CandidateInputs(Schema):
    """Stages that a candidate stage reads."""

    model: StageName
    """Stage that provides the model to prune."""
    teacher: StageName
    """Stage that provides the teacher."""
    scores: StageName | None = None
    """Stage that provides the scores."""
    data: StageName
    """Stage that provides the tokenized text."""
    check: StageName | None = None
    """Teacher check to wait for. null: none."""
    heldout: StageName | None = None
    """Stage that provides the held-out text of `compensation`. null: the held-out part of the data."""
    rivals: tuple[StageName, ...] = ()
    """Candidates of the previous rung."""


class CandidateStage(StageParams):
    """One candidate of a search in one rung. The planner writes these stages."""

    kind: Literal["candidate"]
    inputs: CandidateInputs
    rung: PositiveInt
    """Number of the rung, from 1."""
    name: str | None = None
    """Name of the grid point, in the first rung."""
    place: PositiveInt | None = None
    """Rank in the previous rung of the candidate that continues here, in later rungs."""
    target: Target = Target()
    """Sizes of the candidate, in the first rung."""
    num_steps: PositiveInt
    """Optimizer steps."""
    retraining: Training
    """How the candidate is trained."""
    selection: SelectionRules
    """How the indices that stay are chosen."""
    min_generate_tokens_per_s: float | None = None
    """Slower candidates are not trained. null: no limit."""
    measure_speed: SpeedMeasurement | None = None
    """Measure the generation speed after pruning. null: do not."""
    compensation: Compensation | None = None
    """Repair the candidate by least squares after pruning, in the first rung. null: do not."""
