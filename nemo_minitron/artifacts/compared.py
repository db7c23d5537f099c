"""Which published files have been compared with their checksums, as they are now.

Reading 16 GB for a checksum takes seconds to a minute, so it is done when a stage first reads a file, and again when
the file has changed: its size, inode or one of its times is another one then.
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
"""What a manifest says of a file: {bytes, sha256}."""
LOGITS_FILE = "logits.json"
"""Which models there compute the same logits in transformers and in Megatron; see evaluation/agreement.py."""
_State = list[int]


def changed_file(files: Mapping[Path, Facts], memory: Path) -> Path | None:
    """The first file whose contents are not those of its manifest. Files that `memory` knows as they are, are not read.

    Args:
        files: all there, with the right sizes.
        memory: written anew when something was compared; nothing is lost without it.
    """
    known, states = read_memory(memory), {file: file_state(file) for file in files}
    unseen = [file for file, facts in files.items() if known.get(str(file)) != [states[file], facts["sha256"]]]
    if not unseen:
        return None
    found = file_facts(unseen)
    bad = next((file for file in unseen if found[file]["sha256"] != files[file]["sha256"]), None)
    if bad is None:
        write_memory(memory, {**known, **{str(file): [states[file], facts["sha256"]] for file, facts in files.items()}})
    return bad


def file_state(file: Path) -> _State:
    """Changes when the file does: size, inode, and the times of its contents and of its entry."""
    found = file.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def read_memory(memory: Path) -> dict[str, Any]:
    """What was kept; nothing when the file is missing or damaged."""
    try:
        return unsealed(json.loads(memory.read_text()))
    except (OSError, ValueError, AttributeError):
        return {}


def write_memory(memory: Path, facts: Mapping[str, Any]) -> None:
    """A disk that takes nothing more costs time, not the stage."""
    require_real_folder(memory.parent)
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, json.dumps(sealed(facts)))
