"""Whether the files of a training checkpoint are as they were written. Every function is called on every rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.errors import CheckpointError
from nemo_minitron.system.files import SEAL, sealed, unsealed
from nemo_minitron.system.ownership import TRUST_VARIABLE, is_trusted

FACTS_FILE = "training.json"
"""Written last: it makes a checkpoint complete. Holds the checksums of all other files, and its own."""
READ = (".metadata", ".json", ".pt", ".distcp")
"""Ends of the names of what is read of a checkpoint."""
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
    return unsealed(_read(folder))


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")))


def damage(folder: Path, session: Session) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None: nothing. Ranks share the reading of its files.

    Raises:
        CheckpointError: it has no checksums, and the user has not said that it is trusted.
    """
    try:
        found = _read(folder)
        unsealed(found)
        listed = sorted(_files(found).items())
        added = _unlisted(folder, found)
    except (OSError, ValueError, TypeError) as error:
        return f"{FACTS_FILE}: {error}"
    if added:
        if not is_trusted(folder):
            raise _without_checksums(folder, added)
        listed = []
    bad = torch.zeros(len(listed), device=session.device)
    for number in range(session.rank, len(listed), session.world_size):
        name, facts = listed[number]
        bad[number] = float(not _is_as_written(folder / name, facts))
    session.sum(bad)
    names = [name for (name, _), is_bad in zip(listed, bad.tolist(), strict=True) if is_bad]
    return f"{', '.join(names)} was changed since it was written" if names else None


def _unlisted(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Files of a checkpoint without a checksum; the list itself, when it has none of its own."""
    if SEAL not in facts:
        return [FACTS_FILE]
    names = {file.name for file in folder.iterdir() if file.name.endswith(READ)}
    return sorted(names - _files(facts).keys() - {FACTS_FILE})


def _files(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The checksums: file name -> {bytes, sha256}.

    Raises:
        ValueError: they are something else.
    """
    files = facts.get("files", {})
    known = isinstance(files, dict) and all(
        isinstance(found, dict) and found.keys() == {"bytes", "sha256"} and Path(name).name == name
        for name, found in files.items()
    )
    if not known:
        raise ValueError("files holds no checksums")
    return dict(files)


def _without_checksums(folder: Path, files: list[str]) -> CheckpointError:
    return CheckpointError(
        f"The training checkpoint has no checksum of {', '.join(files[:3])}: an old version has written it, or "
        "somebody has changed it.",
        where=str(folder),
        next_step=f"If you have written it yourself: export {TRUST_VARIABLE}={folder.resolve()}. "
        "Else delete this folder; the same command then goes on from the one before it, or starts again.",
    )


def _is_as_written(file: Path, facts: Mapping[str, Any]) -> bool:
    try:
        return file.stat().st_size == facts["bytes"] and file_facts([file])[file] == facts
    except OSError:
        return False
