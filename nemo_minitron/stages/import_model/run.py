"""Import a model into the run as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.import_model.params import ImportStage
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.typed_inputs import NoInputs

if TYPE_CHECKING:
    from nemo_minitron.hf.checkpoint import Checkpoint


_NAMES = {"architectures", "model_type"}
"""Keys of config.json without which an architecture only lists values to check."""
_FREE = {"max_position_embeddings"}
"""Sizes that no tensor depends on and that model authors change later, so recipes may leave them out."""


def import_model(params: ImportStage, inputs: NoInputs, ctx: StageContext) -> Result:
    """Copy or convert a folder, a model of the Hugging Face Hub or a GGUF file into a checked Hugging Face checkpoint.

    If `dtype` is `keep` or the stored one, the weights of a folder are copied bit for bit; with `keep`, a GGUF file
    becomes fp32. config.json is written with all values spelled out, so that later readers interpret it the same way.

    Raises:
        CheckpointError: the model is missing, damaged or unsupported, or has another architecture than the recipe.
    """
    from nemo_minitron.hf.checkpoint import CONFIG_FILE, model_facts, read_config
    from nemo_minitron.hf.license import read_license
    from nemo_minitron.hf.source import HUB, resolve_model

    source = resolve_model(params.source, Path(ctx.execution.assets_dir), params.revision)
    ctx.progress.say(f"import {source}")
    license_id = read_license(source) if source.is_dir() else None
    if source.is_dir():
        require_architecture(read_config(source), params.architecture, str(source / CONFIG_FILE))
        for note in _copy_folder(source, ctx.out_dir, params.dtype, may_link=params.source.startswith(HUB)):
            ctx.progress.say(note)
    else:
        from nemo_minitron.hf.gguf import convert_gguf

        license_id = convert_gguf(source, ctx.out_dir, _torch_dtype(params.dtype))
        require_architecture(read_config(ctx.out_dir), params.architecture, str(source))
    return {**model_facts(ctx.out_dir), "license": params.license or license_id, "source": params.source}


def require_architecture(config: dict[str, Any], expected: dict[str, Any] | None, where: str) -> None:
    """Check that config.json, completed with the defaults of transformers, has the values that the recipe expects.

    Args:
        where: the file that the config was read from.

    Raises:
        CheckpointError: a value differs; the message names each such key.
    """
    from nemo_minitron.families import explicit_config

    if not expected:
        return
    found = explicit_config(config, where=where)
    different = [
        f"{key} = {found.get(key)!r} (recipe: {value!r})"
        for key, value in expected.items()
        if not _equal(found.get(key), value)
    ]
    if different:
        raise CheckpointError(
            f"Wrong architecture: {'; '.join(different)}.",
            where=where,
            next_step="Set source to the model that the recipe was written for, or correct `architecture`.",
        )
    if _NAMES & expected.keys():
        _require_same_defaults(config, expected, where)


def _require_same_defaults(config: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Check that the keys that `architecture` leaves out have no other values in the model than the plan assumed."""
    from nemo_minitron.families import read_shape

    model, assumed = asdict(read_shape(config, where=where)), asdict(read_shape(expected, where="architecture"))
    different = [
        f"{field} = {value!r} (assumed: {assumed[field]!r})"
        for field, value in model.items()
        if field not in _FREE and not _equal(value, assumed[field])
    ]
    if different:
        raise CheckpointError(
            f"`architecture` leaves out keys of config.json, and their defaults are wrong: {'; '.join(different)}.",
            where=where,
            next_step="Add the missing keys of the model's config.json to `architecture`.",
        )


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(_equal(found[key], value) for key, value in expected.items())
    if isinstance(expected, float) and isinstance(found, int | float):
        return abs(found - expected) <= 1e-6 * abs(expected)
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def _copy_folder(source: Path, out_dir: Path, dtype: str, *, may_link: bool) -> list[str]:
    """Copy or convert a folder, and return messages about repairs of the tokenizer's files."""
    from nemo_minitron.families import parameters
    from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, require_tied_head

    checkpoint = Checkpoint.open(source)
    require_tied_head(checkpoint)
    notes = copy_side_files(source, out_dir)
    if dtype == "keep" or checkpoint.dtypes == {dtype}:
        _copy_weights(checkpoint, out_dir, may_link=may_link)
        return notes
    writer = CheckpointWriter(out_dir, checkpoint.config, dtype=_torch_dtype(dtype))
    for parameter in parameters(checkpoint.shape):
        writer.add(parameter.hf, checkpoint.read(parameter.hf))
    writer.close()
    return notes


def _copy_weights(checkpoint: Checkpoint, out_dir: Path, *, may_link: bool) -> None:
    """Copy the weight files unchanged, and write config.json with the key names of both transformers 4 and 5."""
    from nemo_minitron.hf.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, write_json

    for file in checkpoint.files:
        (_link_or_copy if may_link else shutil.copyfile)(file, out_dir / file.name)
    if [file.name for file in checkpoint.files] != [SINGLE_FILE]:
        shutil.copyfile(checkpoint.path / INDEX_FILE, out_dir / INDEX_FILE)
    stored = {"dtype": checkpoint.dtype, "torch_dtype": checkpoint.dtype}
    write_json(out_dir / CONFIG_FILE, {**checkpoint.config, **stored})


def _link_or_copy(source: Path, target: Path) -> None:
    """Link the file if possible: files in the Hub's cache never change, so a hard link is as good as a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _torch_dtype(name: str) -> Any:
    import torch

    return None if name == "keep" else getattr(torch, name)
