"""Keys of import_model stages."""

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
    """Branch, tag or commit on the hub."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    license: str | None = None
    """SPDX id carried into the exported model card; read from the source when None."""
    architecture: dict[str, Any] | None = None
    """Expected keys of config.json. Lets `plan` count parameters before the download, and is checked at import."""
