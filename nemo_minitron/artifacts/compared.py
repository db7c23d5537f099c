"""Records of the published files whose checksums have been verified.

Hashing 16 GB takes seconds to a minute. A file is therefore hashed when a stage first reads it, and again only when its
size, inode or one of its time stamps has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.system.files import sealed, unsealed, write_whole
from nemo_minitron.system.safe_files import require_real_folder

Facts = Mapping[str, Any]
"""Entry of a file in a manifest: {bytes, sha256}."""
LOGITS_FILE = "logits.json"
"""File in `COMPARED` with the models that compute the same logits in transformers and Megatron; see
evaluation/agreement.py."""
_State = list[int]


def changed_file(files: Mapping[Path, Facts], record: Path) -> Path | None:
    """Return the first file whose contents differ from its manifest, skipping those that are unchanged since `record`.

    Args:
        files: existing files with the right sizes.
        record: JSON file with the verified states; it is updated, and a missing one only costs time.
    """
    known, states = read_record(record), {file: file_state(file) for file in files}
    unverified = [file for file, facts in files.items() if known.get(str(file)) != [states[file], facts["sha256"]]]
    if not unverified:
        return None
    found = file_facts(unverified)
    bad = next((file for file in unverified if found[file]["sha256"] != files[file]["sha256"]), None)
    if bad is None:
        write_record(record, {**known, **{str(file): [states[file], facts["sha256"]] for file, facts in files.items()}})
    return bad


def file_state(file: Path) -> _State:
    """Return values that change when the file does: size, inode, and the times of its contents and of its inode."""
    found = file.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def read_record(record: Path) -> dict[str, Any]:
    """Read a record; empty when the file is missing or damaged."""
    try:
        return unsealed(json.loads(record.read_text()))
    except (OSError, ValueError, AttributeError):
        return {}


def write_record(record: Path, facts: Mapping[str, Any]) -> None:
    """Write a record. Errors such as a full disk are ignored: the files are then hashed again."""
    require_real_folder(record.parent)
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(sealed(facts)))
