"""Checksums of the functions of other packages that a stage calls: edited code makes its stage `changed`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from nemo_minitron.artifacts.manifest import Manifest, sha256_of
from nemo_minitron.schema.base import StageParams
from nemo_minitron.stages.registry import STAGES


def function_facts(stage: StageParams, manifest: Manifest | None) -> dict[str, str]:
    """Return `module:function` -> sha256 of the module's file. Modules that it imports in turn do not count.

    Args:
        manifest: manifest of the stage, if it has finished. Its checksum is returned for a module that is not installed
            here, as on a login node; a manifest of an older version has none, so that its stage does not change.
    """
    before = None if manifest is None else manifest.payload.get("functions", {})
    facts = {}
    for name in STAGES[stage.kind].functions(stage):
        if before is not None and name not in before:
            continue
        file = _file_of(name.partition(":")[0])
        if file is not None:
            facts[name] = sha256_of(file)
        elif before is not None:
            facts[name] = before[name]
    return facts


def functions_elsewhere(stages: Mapping[str, StageParams]) -> Iterator[str]:
    """Yield one line for each function that a stage calls and whose module is not installed here."""
    for name, stage in stages.items():
        for function in STAGES[stage.kind].functions(stage):
            module = function.partition(":")[0]
            if _file_of(module) is None:
                yield f"stages.{name} calls {function}: there is no module {module} here. The stage needs it."


def _file_of(module: str) -> Path | None:
    """Return the file of a module, without importing it or its parent packages; None if there is none."""
    first, *rest = module.split(".")
    try:
        spec = find_spec(first)
    except (ImportError, ValueError):
        return None
    path = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, list(spec.submodule_search_locations))
    file = None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)
    return file if file is not None and file.is_file() else None
