"""Use an existing model folder in the run without copying it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.errors import CheckpointError
from nemo_minitron.stages.adopt.params import AdoptStage
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.typed_inputs import NoInputs
from nemo_minitron.system.files import user_path


def adopt(params: AdoptStage, inputs: NoInputs, ctx: StageContext) -> Result:
    """Check the folder, and record its path and the checksums of its files. Later stages read the folder itself.

    Raises:
        CheckpointError: the model is incomplete, or its weights differ from the sha256 in the recipe.
    """
    from nemo_minitron.hf.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, model_facts, side_files
    from nemo_minitron.hf.file_content import require_content
    from nemo_minitron.hf.license import read_license

    path = user_path(params.path).resolve()
    _require_folder(path, params.path)
    facts = model_facts(path)
    is_single = (path / SINGLE_FILE).is_file()
    named = path / (SINGLE_FILE if is_single else INDEX_FILE)
    for file in side_files(path):
        require_content(file, may_be_empty=file.suffix != ".json")
    weights = Checkpoint.open(path).files
    files = file_facts({path / "config.json", named, *weights, *side_files(path)})
    found = files[named]["sha256"] if is_single else sha256_of_all(files, named, weights)
    if params.sha256 and found != params.sha256:
        raise _other_weights(found, params.sha256, named, is_single=is_single)
    listed = {str(file): found for file, found in sorted(files.items())}
    return {**facts, "license": read_license(path), "adopted_path": str(path), "adopted_files": listed}


def sha256_of_all(files: Mapping[Path, Mapping[str, Any]], index: Path, shards: Iterable[Path]) -> str:
    """Return the sha256 of the output of `sha256sum INDEX SHARD ...`, with the shards in order of their names."""
    named = [index, *sorted(shards, key=lambda shard: shard.name)]
    lines = "".join(f"{files[file]['sha256']}  {file.name}\n" for file in named)
    return hashlib.sha256(lines.encode()).hexdigest()


def _other_weights(found: str, wanted: str, named: Path, *, is_single: bool) -> CheckpointError:
    of_index = "" if is_single else f" of {named.name} and all shards"
    how = f"To compute the sha256{of_index}, run in the folder: sha256sum {named.name} *.safetensors | sha256sum"
    return CheckpointError(
        f"The sha256{of_index} is {found}.", where=str(named), allowed=wanted, next_step=None if is_single else how
    )


def _require_folder(path: Path, given: str) -> None:
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder." if path.exists() else f"{path} does not exist.",
            where=f"path: {given}",
            allowed="a folder with config.json and *.safetensors",
            next_step="For asset:NAME, hf:ORG/NAME or a .gguf file, use a stage of kind import.",
        )
