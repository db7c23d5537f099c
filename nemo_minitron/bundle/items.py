"""A file of a bundle."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nemo_minitron.errors import ConfigError


@dataclass(frozen=True)
class Item:
    """One file."""

    member: str
    """Path below the bundle's folder."""
    content: Path | bytes
    what: str
    """script, recipe, config, model, data or wheel."""

    @property
    def size_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def sorted_items(items: Iterable[Item]) -> list[Item]:
    """By member, each once.

    Raises:
        ConfigError: a name that would leave the folder or cannot be listed, or two files for one name.
    """
    found: dict[str, Item] = {}
    for item in items:
        _require_fit(item)
        other = found.setdefault(item.member, item)
        if other is not item and not _same(other, item):
            raise ConfigError(
                f"Two different files would be {item.member}.",
                where=" and ".join(str(one.content) for one in (other, item) if isinstance(one.content, Path)) or None,
                next_step="Bundle the recipes one by one.",
            )
    return [found[member] for member in sorted(found)]


def _require_fit(item: Item) -> None:
    path = PurePosixPath(item.member)
    if path.is_absolute() or ".." in path.parts or item.member in ("", "."):
        raise ConfigError(f"{item.member} would stand outside of the bundle.", next_step="Name the source by its path.")
    if any(ord(sign) < 32 for sign in item.member):
        raise ConfigError(f"The file name {item.member!r} has a control character.", next_step="Rename the file.")


def _same(one: Item, other: Item) -> bool:
    if isinstance(one.content, Path) and isinstance(other.content, Path):
        return one.content.samefile(other.content) or filecmp.cmp(one.content, other.content, shallow=False)
    return one.content == other.content
