"""Megatron's index files of a dataset. It loads what is there as it is, so only a whole index may be there."""

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


def drop_unless_whole(folder: Path) -> None:
    """Delete an index that a kill or a full disk has cut off, or that was changed since: it is made again."""
    if _is_main() and folder.is_dir() and not _is_whole(folder):
        shutil.rmtree(folder)


def mark_whole(folder: Path) -> None:
    """The index has been written to its end."""
    if _is_main() and folder.is_dir() and not _is_whole(folder):
        write_whole(folder / MARK, json.dumps(sealed(_files(folder))))


def _is_main() -> bool:
    """Megatron's rank 0 makes an index while the others wait."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _is_whole(folder: Path) -> bool:
    try:
        return unsealed(dict(json.loads((folder / MARK).read_text()))) == _files(folder) and _has_arrays_only(folder)
    except (OSError, ValueError, TypeError):
        return False


def _has_arrays_only(folder: Path) -> bool:
    """Megatron lets numpy unpickle what does not begin as an array; mapped arrays, as it asks for, hold no objects."""
    for file in folder.rglob("*.np[yz]"):
        with file.open("rb") as opened:
            if opened.read(len(ARRAY)) != ARRAY:
                return False
    return True


def _files(folder: Path) -> dict[str, object]:
    return {name: facts for name, facts in hash_files(folder).items() if name != MARK}
