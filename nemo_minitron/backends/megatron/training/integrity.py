"""Check the files of a training checkpoint against their checksums. Call every function on every rank."""

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
"""Written last; marks a checkpoint as complete. Contains the checksums of all other files and its own."""
READ = (".metadata", ".json", ".pt", ".distcp")
"""Suffixes of the files that loading a checkpoint reads."""
_WRITTEN = "written_{rank:05d}.json"


def write_facts(folder: Path, facts: Mapping[str, Any], written: Mapping[str, Any], session: Session) -> None:
    """Write the facts file, which marks the checkpoint as complete.

    Args:
        written: file name -> {bytes, sha256} of this rank's files; the main rank hashes all other files itself.
    """
    if not session.is_main:
        (folder / _WRITTEN.format(rank=session.rank)).write_text(json.dumps(written))
    session.barrier()
    if not session.is_main:
        return
    files = dict(written)
    for rank in range(1, session.world_size):
        of_rank = folder / _WRITTEN.format(rank=rank)
        files |= json.loads(of_rank.read_text())
        of_rank.unlink()
    rest = file_facts(sorted(file for file in folder.iterdir() if file.name not in files))
    files |= {file.name: found for file, found in rest.items()}
    (folder / FACTS_FILE).write_text(json.dumps(sealed({**facts, "files": files})))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the facts given to `write_facts`, and the checksums.

    Raises:
        ValueError: the file is damaged.
        OSError: the file cannot be read.
    """
    return unsealed(_read(folder))


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")))


def find_damage(folder: Path, session: Session) -> str | None:
    """Describe what is wrong with a checkpoint, or return None; the same on every rank. Each rank reads some files.

    Raises:
        CheckpointError: files have no checksums, and the user has not marked the folder as trusted.
    """
    problem, listed, added = _listed(folder)
    # A shared file system may show the nodes different files, and all ranks must take the same path.
    looks = session.gather([problem, added])
    problem = next((theirs for theirs, _ in looks if theirs), None)
    if problem is not None:
        return problem
    if added := sorted({name for _, names in looks for name in names}):
        if not is_trusted(folder):
            raise _without_checksums(folder, added)
        listed = []
    damaged = torch.zeros(len(listed), device=session.device)
    for number in range(session.rank, len(listed), session.world_size):
        name, facts = listed[number]
        damaged[number] = float(not _matches_checksum(folder / name, facts))
    session.sum(damaged)
    names = [name for (name, _), is_bad in zip(listed, damaged.tolist(), strict=True) if is_bad]
    return f"{', '.join(names)} was changed since it was written" if names else None


def _listed(folder: Path) -> tuple[str | None, list[tuple[str, Any]], list[str]]:
    """Return what is wrong with the list of checksums, the list, and files that it lacks, as this rank sees them."""
    try:
        found = _read(folder)
        unsealed(found)
        return None, sorted(_files(found).items()), _unlisted(folder, found)
    except (OSError, ValueError, TypeError) as error:
        return f"{FACTS_FILE}: {error}", [], []


def _unlisted(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """List files without a checksum; the facts file itself, if it has none."""
    if SEAL not in facts:
        return [FACTS_FILE]
    names = {file.name for file in folder.iterdir() if file.name.endswith(READ)}
    return sorted(names - _files(facts).keys() - {FACTS_FILE})


def _files(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checksums: file name -> {bytes, sha256}.

    Raises:
        ValueError: they have another form.
    """
    files = facts.get("files", {})
    known = isinstance(files, dict) and all(
        isinstance(found, dict) and found.keys() == {"bytes", "sha256"} and Path(name).name == name
        for name, found in files.items()
    )
    if not known:
        raise ValueError("the key files contains no valid checksums")
    return dict(files)


def _without_checksums(folder: Path, files: list[str]) -> CheckpointError:
    return CheckpointError(
        f"The training checkpoint has no checksum of {', '.join(files[:3])}: it was written by an old version or "
        "changed by somebody.",
        where=str(folder),
        next_step=f"If you wrote it yourself: export {TRUST_VARIABLE}={folder.resolve()}. "
        "Otherwise delete this folder; the same command then resumes from the previous checkpoint, or starts again.",
    )


def _matches_checksum(file: Path, facts: Mapping[str, Any]) -> bool:
    try:
        return file.stat().st_size == facts["bytes"] and file_facts([file])[file] == facts
    except OSError:
        return False
