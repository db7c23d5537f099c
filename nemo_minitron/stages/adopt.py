"""Take an existing model folder into the run without copying it."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.manifest import sha256_of
from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import AdoptStage
from nemo_minitron.errors import CheckpointError
from nemo_minitron.stages.spec import Result, StageContext


def adopt(params: AdoptStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Check the folder and record where it is; later stages read it there.

    Raises:
        CheckpointError: not a complete model, or not the weights that the recipe names.
    """
    from nemo_minitron.hf.checkpoint import INDEX_FILE, SINGLE_FILE, model_facts
    from nemo_minitron.hf.license import read_license

    path = Path(params.path).expanduser().resolve()
    facts = model_facts(path)
    if params.sha256:
        file = path / (SINGLE_FILE if (path / SINGLE_FILE).is_file() else INDEX_FILE)
        found = sha256_of(file)
        if found != params.sha256:
            raise CheckpointError(f"sha256 is {found}.", where=str(file), allowed=params.sha256)
    return {**facts, "license": read_license(path), "adopted_path": str(path)}
