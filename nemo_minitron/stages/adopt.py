"""Take an existing model folder into the run without copying it."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import AdoptStage
from nemo_minitron.errors import CheckpointError
from nemo_minitron.files import user_path
from nemo_minitron.stages.spec import Result, StageContext


def adopt(params: AdoptStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Check the folder, record where it is and the checksums of its files; later stages read it there.

    Raises:
        CheckpointError: not a complete model, or not the weights that the recipe names.
    """
    from nemo_minitron.hf.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, model_facts, side_files
    from nemo_minitron.hf.impostors import require_content
    from nemo_minitron.hf.license import read_license

    path = user_path(params.path).resolve()
    _require_folder(path, params.path)
    facts = model_facts(path)
    named = path / (SINGLE_FILE if (path / SINGLE_FILE).is_file() else INDEX_FILE)
    for file in side_files(path):
        require_content(file, may_be_empty=file.suffix != ".json")
    files = file_facts({path / "config.json", named, *Checkpoint.open(path).files, *side_files(path)})
    if params.sha256 and files[named]["sha256"] != params.sha256:
        raise CheckpointError(f"sha256 is {files[named]['sha256']}.", where=str(named), allowed=params.sha256)
    listed = {str(file): found for file, found in sorted(files.items())}
    return {**facts, "license": read_license(path), "adopted_path": str(path), "adopted_files": listed}


def _require_folder(path: Path, given: str) -> None:
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder." if path.exists() else f"{path} does not exist.",
            where=f"path: {given}",
            allowed="a folder with config.json and *.safetensors",
            next_step="A stage of kind import also takes asset:NAME, hf:ORG/NAME and a .gguf file.",
        )
