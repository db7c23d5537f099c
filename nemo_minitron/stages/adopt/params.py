"""Keys of adopt stages."""

from __future__ import annotations

from typing import Literal

from nemo_minitron.schema.base import Inputless, StageParams


class AdoptStage(StageParams):
    """Use an existing Hugging Face folder as the output of this stage, without a copy."""

    kind: Literal["adopt"]
    inputs: Inputless = Inputless()
    path: str
    """The folder of the model."""
    sha256: str | None = None
    """Checksum of model.safetensors, compared if given. For a model in shards, the output of `sha256sum
    model.safetensors.index.json *.safetensors | sha256sum` in its folder."""
