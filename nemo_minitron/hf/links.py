"""Links in a folder from somebody else: they may lead to private files, which would then be read and passed on."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_minitron.errors import CheckpointError
from nemo_minitron.system.ownership import TRUST_VARIABLE, is_trusted

_CACHE_PARTS = ("blobs", "snapshots")
"""Of a repository in the hub's cache: `models--ORG--NAME/snapshots/COMMIT/FILE` is a link to `../../blobs/HASH`."""


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a link in a model's folder that leads out of it; the cache of the hub has such links, to its own blobs.

    Raises:
        CheckpointError: naming the link, where it leads, and how to accept it.
    """
    if leads_out(path, folder) and not is_trusted(folder):
        target = f"is a link to {os.readlink(path)}" if path.is_symlink() else "lies behind a link"
        raise CheckpointError(
            f"{path.name} {target}, outside of the model's folder: what is there would become part of the results.",
            where=str(path),
            next_step="Copy the file itself in its place (cp -L); or, if you have made the link or trust who has: "
            f"export {TRUST_VARIABLE}={folder.resolve()}",
        )


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a folder, or a folder on the way to it, is a link to something elsewhere."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return False
    return not any(real.is_relative_to(blobs) for blobs in _blobs(home))


def _blobs(home: Path) -> list[Path]:
    """The files of the same repository, when the folder is a snapshot in the hub's cache."""
    blobs, snapshots = _CACHE_PARTS
    repository = home.parent.parent
    is_snapshot = home.parent.name == snapshots and repository.name.startswith("models--")
    return [repository / blobs] if is_snapshot else []
