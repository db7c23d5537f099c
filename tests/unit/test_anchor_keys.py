"""The weight of anchors over a training, and the rules for their keys."""

from __future__ import annotations

import pytest

from nemo_minitron.plan.fingerprint import params_of
from nemo_minitron.schema.losses import AnchorLoss, Loss
from tests.support.tiny_distill import TWENTY_STEPS


@pytest.mark.parametrize(
    ("keys", "step", "weight"),
    [
        ({}, 0, 2.0),
        ({}, 5, 1.0),
        ({}, 9, 0.2),
        ({"decay_steps": 4}, 3, 0.5),
        ({"decay_steps": 4}, 4, 0.0),
        ({"decay_steps": 4}, 9, 0.0),
        ({"decay": "cosine"}, 0, 2.0),
        ({"decay": "cosine"}, 5, 1.0),
    ],
)
def test_the_weight_falls_to_zero(keys: dict[str, object], step: int, weight: float) -> None:
    assert AnchorLoss(weight=2.0, **keys).weight_at(step, 10) == pytest.approx(weight)


def test_a_training_without_anchors_keeps_its_fingerprint() -> None:
    """The key did not exist in older versions."""
    assert "anchors" not in params_of(TWENTY_STEPS)["loss"]
    anchored = TWENTY_STEPS.model_copy(update={"loss": Loss(anchors=AnchorLoss())})
    assert params_of(anchored)["loss"]["anchors"]["weight"] == 1.0
