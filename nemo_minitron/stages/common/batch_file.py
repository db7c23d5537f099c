"""Results of finished batches in the work folder, so that a killed stage goes on from the first missing one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIX = ".batches.jsonl"
"""Suffix of the files; job scripts count their lines to see whether a stage has made progress."""


class BatchFile:
    """File with one JSON line for each finished batch, in the order of the batches."""

    def __init__(self, file: Path) -> None:
        """Open the file, or create it; a last line that a kill or a full disk has cut off is removed."""
        self._file, self.num_done = file, 0
        file.touch()
        with file.open("r+b") as stream:
            whole_bytes = 0
            for line in stream:
                if line.endswith(b"\n"):
                    whole_bytes += len(line)
                    self.num_done += 1
            stream.truncate(whole_bytes)

    def append(self, result: Any) -> None:
        """Add the result of the next batch, any JSON value."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")
        self.num_done += 1

    def __iter__(self) -> Iterator[Any]:
        with self._file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
