"""The importance scores that a selection uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.schema.pruning import Selection
from nemo_minitron.stages.artifacts import Model, Scores

if TYPE_CHECKING:
    from torch import Tensor


def load_scores(params: Selection, model: Model, scores: Scores | None) -> dict[str, Tensor]:
    """Return axis -> importance as the selection's method defines it; empty for a random selection."""
    if params.method == "magnitude":
        from nemo_minitron.hf.checkpoint import Checkpoint
        from nemo_minitron.pruning.magnitude import magnitude_scores

        return magnitude_scores(Checkpoint.open(model.path), params)
    return {} if scores is None else scores.load()
