"""Whether the files of a training checkpoint are as they were written. Every function is called on every rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.files import sealed, unsealed

FACTS_FILE = "training.json"
"""Written last: it makes a checkpoint complete. Holds the checksums of all other files, and its own."""
_WRITTEN = "written_{rank:05d}.json"


def write_facts(folder: Path, facts: Mapping[str, Any], written: Mapping[str, Any], session: Session) -> None:
    """Make a checkpoint complete.

    Args:
        written: file name -> {bytes, sha256} of what this rank has written; the main rank looks at the others itself.
    """
    if not session.is_main:
        (folder / _WRITTEN.format(rank=session.rank)).write_text(json.dumps(written))
    session.barrier()
    if not session.is_main:
        return
    files = dict(written)
    for rank in range(1, session.world_size):
        told = folder / _WRITTEN.format(rank=rank)
        files |= json.loads(told.read_text())
        told.unlink()
    rest = file_facts(sorted(file for file in folder.iterdir() if file.name not in files))
    files |= {file.name: found for file, found in rest.items()}
    (folder / FACTS_FILE).write_text(json.dumps(sealed({**facts, "files": files})))


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_facts` was given, and the checksums.

    Raises:
        ValueError: damaged.
        OSError: it cannot be read.
    """
    return unsealed(dict(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))))


def damage(folder: Path, session: Session) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None: nothing. Ranks share the reading of its files."""
    try:
        # Those of older versions have no checksums.
        listed = sorted(read_facts(folder).get("files", {}).items())
    except (OSError, ValueError, TypeError) as error:
        return f"{FACTS_FILE}: {error}"
    bad = torch.zeros(len(listed), device=session.device)
    for number in range(session.rank, len(listed), session.world_size):
        name, facts = listed[number]
        bad[number] = float(not _is_as_written(folder / name, facts))
    session.sum(bad)
    names = [name for (name, _), is_bad in zip(listed, bad.tolist(), strict=True) if is_bad]
    return f"{', '.join(names)} was changed since it was written" if names else None


def _is_as_written(file: Path, facts: Mapping[str, Any]) -> bool:
    try:
        return file.stat().st_size == facts["bytes"] and file_facts([file])[file] == facts
    except OSError:
        return False
