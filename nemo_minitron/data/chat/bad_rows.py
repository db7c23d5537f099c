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

    def require_few(self, max_fraction: float, where: str) -> None:
        """Raises DataError with the first ten when more than the tolerated share is bad.

        Args:
            where: the recipe's key above `max_bad_fraction`.
        """
        if self.num_bad <= max_fraction * self.num_rows:
            return
        share = self.num_bad / self.num_rows
        more = [f"... and {self.num_bad - len(self.first)} more"] if self.num_bad > len(self.first) else []
        listed = "".join(f"\n  - {line}" for line in [*self.first, *more])
        # Rounded up, so that the advice is enough.
        enough = min(1.0, int(share * 1000 + 1) / 1000)
        raise DataError(
            f"{self.num_bad} of {self.num_rows} rows are bad ({share:.1%}):{listed}",
            where=where,
            allowed=f"{where}.max_bad_fraction = {max_fraction}",
            next_step=f"Correct the rows, or leave them out with {where}.max_bad_fraction={enough:g}.",
        )
