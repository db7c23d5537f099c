"""Training curves: one JSON row a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Appends rows; a resumed run first drops what its checkpoint does not know.

    Args:
        folder: curves.jsonl and tensorboard/ are kept here.
        first_step: rows after this step are dropped; -1 drops all.
        enabled: only the main rank writes.
    """

    def __init__(self, folder: Path, *, first_step: int, enabled: bool) -> None:
        self.path = folder / "curves.jsonl"
        self.rows = [row for row in read_curves(self.path) if row["step"] <= first_step] if enabled else []
        self._writer = None
        self._enabled = enabled
        if enabled:
            self.flush()
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def add(self, step: int, **values: float) -> None:
        """Record values that belong to the state after `step` steps."""
        if not self._enabled:
            return
        self.rows.append({"step": step, **values})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"distill/{name}", value, step)

    def flush(self) -> None:
        """Rewrite the file from what is in memory."""
        if self._enabled:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def has(self, key: str) -> bool:
        """Whether any row has it."""
        return any(key in row for row in self.rows)

    def first(self, key: str) -> float:
        return float(next(row[key] for row in self.rows if key in row))

    def last(self, key: str) -> float:
        return float(next(row[key] for row in reversed(self.rows) if key in row))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_curves(path: Path) -> list[dict[str, Any]]:
    """Rows of a curve file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
