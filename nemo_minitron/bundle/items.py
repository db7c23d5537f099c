"""Files of a bundle."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nemo_minitron.errors import ConfigError


@dataclass(frozen=True)
class Item:
    """One file of a bundle."""

    member: str
    """Path relative to the bundle's folder."""
    content: Path | bytes
    what: str
    """Kind of file: script, recipe, config, model, data or wheel."""

    @property
    def size_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def sorted_items(items: Iterable[Item]) -> list[Item]:
    """Return the items sorted by member, without duplicates.

    Raises:
        ConfigError: a name leads out of the folder or has control characters, or two files have the same name.
    """
    found: dict[str, Item] = {}
    for item in items:
        _require_valid_name(item)
        other = found.setdefault(item.member, item)
        if other is not item and not _same(other, item):
            raise ConfigError(
                f"Two different files would have the name {item.member} in the bundle.",
                where=" and ".join(str(one.content) for one in (other, item) if isinstance(one.content, Path)) or None,
                next_step="Make a separate bundle for each recipe.",
            )
    return [found[member] for member in sorted(found)]


def _require_valid_name(item: Item) -> None:
    path = PurePosixPath(item.member)
    if path.is_absolute() or ".." in path.parts or item.member in ("", "."):
        raise ConfigError(f"{item.member} would be outside of the bundle.", next_step="Give the source as a path.")
    if any(ord(sign) < 32 for sign in item.member):
        raise ConfigError(f"The file name {item.member!r} has a control character.", next_step="Rename the file.")


def _same(one: Item, other: Item) -> bool:
    if isinstance(one.content, Path) and isinstance(other.content, Path):
        return one.content.samefile(other.content) or filecmp.cmp(one.content, other.content, shallow=False)
    return one.content == other.content
