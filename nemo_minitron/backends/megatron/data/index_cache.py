"""Validate Megatron's index files of a dataset. Megatron loads them unchecked, so incomplete ones must be deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from nemo_minitron.artifacts.manifest import hash_files
from nemo_minitron.system.files import sealed, unsealed, write_whole

MARK = "whole.json"
ARRAY = b"\x93NUMPY"
"""The first bytes of an .npy file."""


def drop_unless_complete(folder: Path) -> None:
    """Delete an index that a kill or a full disk has truncated, or that was changed; Megatron then rebuilds it."""
    if _is_main() and folder.is_dir() and not _is_complete(folder):
        shutil.rmtree(folder)


def mark_complete(folder: Path) -> None:
    """Record the checksums of a completely written index."""
    if _is_main() and folder.is_dir() and not _is_complete(folder):
        write_whole(folder / MARK, json.dumps(sealed(_files(folder))))


def _is_main() -> bool:
    """Return whether this is rank 0, which builds the index while the others wait."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _is_complete(folder: Path) -> bool:
    try:
        return unsealed(dict(json.loads((folder / MARK).read_text()))) == _files(folder) and _has_arrays_only(folder)
    except (OSError, ValueError, TypeError):
        return False


def _has_arrays_only(folder: Path) -> bool:
    """Check that all files are arrays: Megatron lets numpy unpickle others. Memory-mapped arrays hold no objects."""
    for file in folder.rglob("*.np[yz]"):
        with file.open("rb") as opened:
            if opened.read(len(ARRAY)) != ARRAY:
                return False
    return True


def _files(folder: Path) -> dict[str, object]:
    return {name: facts for name, facts in hash_files(folder).items() if name != MARK}
