"""Refusal of links in model folders from other people, which could copy private files into the results."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_minitron.errors import CheckpointError
from nemo_minitron.system.ownership import TRUST_VARIABLE, is_trusted

_CACHE_PARTS = ("blobs", "snapshots")
"""Folders in the hub's cache, where `models--ORG--NAME/snapshots/COMMIT/FILE` is a link to `../../blobs/HASH`."""


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a link from a model folder to a file outside of it. Links of the hub's cache to its blobs are accepted.

    Raises:
        CheckpointError: names the link, its target, and how to accept it.
    """
    if leads_out(path, folder) and not is_trusted(folder):
        target = f"is a link to {os.readlink(path)}" if path.is_symlink() else "is reached through a link"
        raise CheckpointError(
            f"{path.name} {target}, outside of the model's folder: the target would become part of the results.",
            where=str(path),
            next_step="Replace the link with a copy of the file (cp -L); or, if you created the link or trust its "
            f"author: export {TRUST_VARIABLE}={folder.resolve()}",
        )


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder is, or goes through, a link to a target outside of the folder."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return False
    return not any(real.is_relative_to(blobs) for blobs in _blobs(home))


def _blobs(home: Path) -> list[Path]:
    """Return the blob folder of the repository if the folder is a snapshot in the hub's cache."""
    blobs, snapshots = _CACHE_PARTS
    repository = home.parent.parent
    is_snapshot = home.parent.name == snapshots and repository.name.startswith("models--")
    return [repository / blobs] if is_snapshot else []
