"""Writing files that others may read at any moment; and where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Replace a file: a reader finds the old text or the new one, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def cache_dir() -> Path:
    """Environments and wheels; may be removed at any time that nothing runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo-minitron"
