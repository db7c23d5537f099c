"""Keys of import stages."""

from __future__ import annotations

from typing import Any, Literal

from nemo_minitron.schema.base import Inputless, StageParams


class ImportStage(StageParams):
    """Bring a Hugging Face model (folder, hub name or GGUF file) into the run."""

    kind: Literal["import"]
    inputs: Inputless = Inputless()
    source: str
    """`asset:NAME`, `hf:ORG/NAME`, a folder with config.json, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the Hugging Face Hub."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Format of the weights in the run. keep: as stored."""
    license: str | None = None
    """SPDX id for the model card of the exported model. null: read from the source."""
    architecture: dict[str, Any] | None = None
    """Keys that config.json is expected to have. `plan` counts parameters from them before the download, and the import
    checks them, and the defaults of those that are left out."""
