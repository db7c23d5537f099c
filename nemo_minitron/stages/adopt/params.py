"""Keys of adopt stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Inputless, StageParams


class AdoptStage(StageParams):
    """Use an existing Hugging Face folder as the output of this stage; it is not copied."""

    kind: Literal["adopt"]
    inputs: Inputless = Inputless()
    path: str
    sha256: str | None = None
    """Of model.safetensors, checked when given; of a model in shards, what
    `sha256sum model.safetensors.index.json *.safetensors | sha256sum` prints in its folder."""
