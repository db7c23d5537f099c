"""Counting bad rows; too many of them are an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.errors import DataError

_SHOWN = 10


@dataclass
class BadRows:
    """Counts of bad rows in one pass."""

    num_rows: int = 0
    """All rows, good and bad."""
    num_bad: int = 0
    first: list[str] = field(default_factory=list)
    """`file:line: reason` of the first ten bad rows."""

    def add(self, where: str, reason: object) -> None:
        self.num_bad += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {reason}")

    def facts(self) -> dict[str, Any]:
        """Return the counts for a manifest."""
        return {"bad_rows": self.num_bad, "first_bad_rows": list(self.first)}

    def require_few(self, max_fraction: float, where: str, key: str | None = None) -> None:
        """Raise DataError, listing the first ten bad rows, when their share exceeds `max_fraction`.

        Args:
            where: recipe key of the stage.
            key: recipe key of the largest allowed share; None means `max_bad_fraction` of the stage.
        """
        key = key or f"{where}.max_bad_fraction"
        if self.num_bad <= max_fraction * self.num_rows:
            return
        if self.num_bad == self.num_rows:
            raise self.none_left(where)
        # Round up, so that the suggested value suffices.
        enough = min(1.0, int(self.num_bad / self.num_rows * 1000 + 1) / 1000)
        raise DataError(
            f"{self.num_bad} of {self.num_rows} rows are bad ({self.num_bad / self.num_rows:.1%}):{self._listed()}",
            where=where,
            allowed=f"{key} = {max_fraction}",
            next_step=f"Correct the rows, or leave them out with {key}={enough:g}.",
        )

    def none_left(self, where: str) -> DataError:
        """Return the error for the case that every row is bad, so that none would be left."""
        return DataError(
            f"All {self.num_rows} rows are bad:{self._listed()}",
            where=where,
            next_step="Correct the rows, or the setting that does not fit them: `format`, `leave_out` or the template.",
        )

    def _listed(self) -> str:
        more = [f"... and {self.num_bad - len(self.first)} more"] if self.num_bad > len(self.first) else []
        return "".join(f"\n  - {line}" for line in [*self.first, *more])
