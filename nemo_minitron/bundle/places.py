"""The paths of sources in a bundle, and which of their files are packed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from nemo_minitron.bundle.items import Item
from nemo_minitron.hf.links import leads_out, require_inside
from nemo_minitron.hf.source import ASSET, BUILT_IN, HUB, HUB_FILES, NOT_FROM_HUB, hub_copy, resolve_model, resolve_path
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.kind import Source
from nemo_minitron.system.files import user_path

ASSETS_DIR = Execution().assets_dir
"""Folder of the assets in a bundle: the default one, because a bundle is used from its own folder."""
OUTSIDE = "outside"
"""Folder in a bundle for sources outside the working folder, or at an absolute path."""
_PATTERN = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class Place:
    """Location of the files of a source in a bundle."""

    source: str
    """Name of the source in the bundle's recipe."""
    base: Path
    """Beginning of the files' paths on this machine, which `prefix` replaces."""
    prefix: str
    """Beginning of the files' paths in the bundle."""

    def member(self, file: Path) -> str:
        return _join(self.prefix, file, self.base)


def place_of(named: Source, assets_dir: Path, outside: dict[str, int]) -> Place:
    """Return the location of a source in a bundle.

    Names of assets and hub models and relative paths inside the working folder are kept; other paths get a numbered
    folder.

    Args:
        outside: source -> its number; a new one is added.
    """
    source, revision = named.location, named.revision
    if source.startswith(ASSET):
        return Place(source, assets_dir, ASSETS_DIR)
    if source.startswith(HUB):
        name = source.removeprefix(HUB)
        folder = resolve_model(source, assets_dir, revision)
        return Place(source, folder, hub_copy(name, revision, Path(ASSETS_DIR)).as_posix())
    path = user_path(source)
    if not path.is_absolute() and not os.path.normpath(path).startswith(".."):
        return Place(os.path.normpath(path) if ".." in path.parts else source, Path(), "")
    base = _before_pattern(path)
    prefix = f"{OUTSIDE}/{outside.setdefault(source, len(outside) + 1)}"
    return Place(_join(prefix, path, base), base, prefix)


def _before_pattern(path: Path) -> Path:
    """Return the folder of a file, or the last folder before a glob pattern with `*`, `?`, `[` or braces."""
    plain = _PATTERN.split(str(path), maxsplit=1)[0]
    return path.parent if plain == str(path) else Path(f"{plain}name").parent


def _join(prefix: str, path: Path, base: Path) -> str:
    return Path(os.path.normpath(os.path.join(prefix, os.path.relpath(path, base)))).as_posix()


def items_of(source: Source, place: Place, assets_dir: Path) -> Iterator[Item]:
    """Yield the files of a source that a stage reads; none of an asset that ships with the package.

    Raises:
        MinitronError: the source is missing, or its model is incomplete.
    """
    location = source.location
    if location.startswith(ASSET) and location.removeprefix(ASSET) in BUILT_IN:
        return
    if source.content == "model":
        for file in _model_files(resolve_model(location, assets_dir, source.revision)):
            yield Item(place.member(file), file, "model")
        return
    for file in _data_files(source, resolve_path(location, assets_dir)):
        yield Item(place.member(file), file, "data")


def _model_files(model: Path) -> list[Path]:
    """Return the files that would be downloaded from the hub: no pickled weights and no code."""
    from nemo_minitron.hf.checkpoint import Checkpoint

    if model.is_file():
        return [model]
    Checkpoint.open(model)
    names = {file: file.relative_to(model).as_posix() for file in _all_files(model)}
    wanted = [file for file, name in names.items() if any(fnmatch(name, pattern) for pattern in HUB_FILES)]
    taken = [file for file in wanted if not any(fnmatch(names[file], pattern) for pattern in NOT_FROM_HUB)]
    for file in taken:
        require_inside(file, model)
    return taken


def _data_files(source: Source, path: Path) -> list[Path]:
    from nemo_minitron.data.found import FORMATS_OF, source_files

    formats = FORMATS_OF.get(source.content)
    return _all_files(path) if formats is None else source_files(path, formats)


def links_out(source: Source, assets_dir: Path) -> list[Path]:
    """Return the data files outside the folder of the source that are packed because a link in it leads to them."""
    if source.location.startswith((ASSET, HUB)) or source.content == "model":
        return []
    path = resolve_path(source.location, assets_dir)
    return [file for file in _data_files(source, path) if path.is_dir() and leads_out(file, path)]


def _all_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
