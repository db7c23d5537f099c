"""The scores that a selection chooses by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.schema.pruning import Selection

if TYPE_CHECKING:
    from torch import Tensor


def load_scores(params: Selection, inputs: Inputs) -> dict[str, Tensor]:
    """Importance by axis, as the selection's method defines it; empty for a random selection."""
    if params.method == "magnitude":
        from nemo_minitron.hf.checkpoint import Checkpoint
        from nemo_minitron.pruning.magnitude import magnitude_scores

        return magnitude_scores(Checkpoint.open(inputs["model"].path), params)
    scores = inputs.get("scores")
    if scores is None:
        return {}
    from safetensors.torch import load_file

    return load_file(str(scores.path / "scores.safetensors"))
