"""Bad rows are counted; too many of them stop the work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.errors import DataError

_SHOWN = 10


@dataclass
class BadRows:
    """Counts of one pass over rows."""

    num_rows: int = 0
    """Good and bad."""
    num_bad: int = 0
    first: list[str] = field(default_factory=list)
    """`file:line: reason` of the first ten."""

    def add(self, where: str, reason: object) -> None:
        self.num_bad += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {reason}")

    def facts(self) -> dict[str, Any]:
        """For manifests."""
        return {"bad_rows": self.num_bad, "first_bad_rows": list(self.first)}

    def require_few(self, max_fraction: float, where: str, key: str | None = None) -> None:
        """Raises DataError with the first ten when more than the tolerated share is bad.

        Args:
            where: the stage's key in the recipe.
            key: of the tolerated share; None: `max_bad_fraction` of the stage.
        """
        key = key or f"{where}.max_bad_fraction"
        if self.num_bad <= max_fraction * self.num_rows:
            return
        if self.num_bad == self.num_rows:
            raise self.none_left(where)
        # Rounded up, so that the advice is enough.
        enough = min(1.0, int(self.num_bad / self.num_rows * 1000 + 1) / 1000)
        raise DataError(
            f"{self.num_bad} of {self.num_rows} rows are bad ({self.num_bad / self.num_rows:.1%}):{self._listed()}",
            where=where,
            allowed=f"{key} = {max_fraction}",
            next_step=f"Correct the rows, or leave them out with {key}={enough:g}.",
        )

    def none_left(self, where: str) -> DataError:
        """The error where every row is bad, so that leaving the bad ones out would leave nothing."""
        return DataError(
            f"All {self.num_rows} rows are bad:{self._listed()}",
            where=where,
            next_step="Correct the rows, or what does not fit them: `format`, `leave_out`, or the chat template.",
        )

    def _listed(self) -> str:
        more = [f"... and {self.num_bad - len(self.first)} more"] if self.num_bad > len(self.first) else []
        return "".join(f"\n  - {line}" for line in [*self.first, *more])
