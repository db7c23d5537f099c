"""Supported and tested versions of Python and of the core packages."""

from __future__ import annotations

from typing import Literal

VersionLevel = Literal["ok", "newer", "problem"]
"""`newer`: newer than the tested versions, which is only a warning. `problem`: too old."""
TESTED: dict[str, tuple[str, str]] = {
    "python": ("3.10", "3.13"),
    "torch": ("2.6", "2.14"),
    "megatron-core": ("0.10.0", "0.19.2"),
    "transformers": ("4.53", "5.24"),
}
"""Package -> oldest supported version, and newest version that the tests have run with."""


def level_of(name: str, found: str) -> VersionLevel:
    """Compare an installed version with the tested ones. A newer patch release of the newest one counts as tested."""
    oldest, newest = (release_numbers(text) for text in TESTED[name])
    own = release_numbers(found)
    if own[: len(oldest)] < oldest:
        return "problem"
    return "ok" if own[: len(newest)] <= newest else "newer"


def release_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without its local part: (2, 13, 0) for 2.13.0+cpu."""
    parts = []
    for part in version.split("+")[0].split("."):
        digits = "".join(letter for letter in part if letter.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
