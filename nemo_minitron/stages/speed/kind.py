"""The kind of stage that measures the speed of several models."""

from __future__ import annotations

from nemo_minitron.stages.kind import MODELS, Output, StageKind
from nemo_minitron.stages.speed.params import SpeedStage

SPEED = StageKind(
    name="speed",
    params=SpeedStage,
    run="nemo_minitron.stages.speed.run:speed",
    outputs=(Output.SPEED,),
    inputs={"models": MODELS},
    one_gpu=True,
    report="speed",
)
