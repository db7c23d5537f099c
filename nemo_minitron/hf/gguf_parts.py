"""Parts of GGUF files that llama.cpp has split: model-00001-of-00004.gguf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError

_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


def split_part(name: str) -> tuple[int, int] | None:
    """Return the part number, from 1, and the number of parts from a file name; None: the file is not split."""
    found = _NAME.search(name)
    return (int(found[1]), int(found[2])) if found and int(found[2]) > 1 else None


def refuse_part(fields: Mapping[str, Any], file: Path) -> None:
    """Refuse a part of a split file.

    Args:
        fields: keys of the GGUF file.

    Raises:
        CheckpointError: the header or, without such keys, the name marks the file as one of several parts.
    """
    number, count = fields.get("split.no"), fields.get("split.count")
    part = split_part(file.name)
    if isinstance(number, int) and isinstance(count, int):
        part = (number + 1, count) if count > 1 else None
    if part is None:
        return
    first = _NAME.sub(lambda found: f"-00001-of-{found[2]}.gguf", file.name)
    out = _NAME.sub(".gguf", file.name)
    merged = out if out != file.name else "OUT.gguf"
    raise CheckpointError(
        f"{file.name} is part {part[0]} of {part[1]} of a split file.",
        where=str(file),
        next_step=f"Merge the parts first, with llama.cpp: llama-gguf-split --merge {first} {merged}",
    )
