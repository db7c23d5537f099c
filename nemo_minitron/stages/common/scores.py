"""Selections by the importance scores that the method of the selection defines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.errors import ArtifactError, NumericsError, PlanError, error_context
from nemo_minitron.schema.pruning import Selection
from nemo_minitron.stages.artifacts import Model, Scores, how_to_remake

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.pruning.plan_file import PrunePlan


def choose_plan(params: Selection, model: Model, scores: Scores | None, key: str) -> PrunePlan:
    """Choose what the model keeps.

    Args:
        key: location of the selection in the recipe, for messages.

    Raises:
        PlanError: the target cannot be cut out of this model.
        ArtifactError, NumericsError: scores are missing, belong to another model, or are not finite.
    """
    from nemo_minitron.pruning.selection import choose_keep

    redo = None if scores is None else how_to_remake(scores.stage)
    with error_context(PlanError, where=key), error_context(ArtifactError, NumericsError, next_step=redo):
        return choose_keep(_load_scores(params, model, scores), model.shape, params)


def _load_scores(params: Selection, model: Model, scores: Scores | None) -> dict[str, Tensor]:
    """Return axis -> importance as the selection's method defines it; empty for a random selection."""
    if params.method == "magnitude":
        from nemo_minitron.hf.checkpoint import Checkpoint
        from nemo_minitron.pruning.magnitude import magnitude_scores

        return magnitude_scores(Checkpoint.open(model.path), params)
    return {} if scores is None else scores.load()
