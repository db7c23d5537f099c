"""Searching glob patterns and folders, limited to a number of entries: `/**/*.txt` would search a whole machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import translate
from functools import lru_cache
from glob import has_magic
from pathlib import Path

from nemo_minitron.errors import DataError
from nemo_minitron.limits import FILES_LOOKED_AT

ANY_FOLDERS = "**"


class VisitLimit:
    """Counts the files and folders that the search for one source visits."""

    def __init__(self, source: Path) -> None:
        self.source, self.seen, self.limit = source, 0, FILES_LOOKED_AT.value()

    def count(self, count: int) -> None:
        """Add to the count; raise DataError when it exceeds the limit."""
        self.seen += count
        if self.seen > self.limit:
            raise DataError(
                f"The search for text stopped after {self.limit:,} files and folders.",
                where=str(self.source),
                next_step="Name a folder or pattern with fewer files. " + FILES_LOOKED_AT.how_to_raise(),
            )


def matches(pattern: Path) -> set[Path]:
    """Return the paths that match a pattern: as glob.glob(recursive=True), plus braces (`a{b,c}` is `ab` and `ac`).

    Raises:
        DataError: the search visited too many files and folders.
    """
    visits, found = VisitLimit(pattern), set[Path]()
    for one in _without_braces(str(pattern), visits):
        path = Path(one)
        found.update(Path(name) for name in _matching(path.anchor, path.parts[bool(path.anchor) :], visits))
    return found


def files_below(root: Path) -> Iterator[Path]:
    """Yield every file below a folder, without following links to folders.

    Raises:
        DataError: there are too many files and folders.
    """
    visits = VisitLimit(root)
    for name, folders, files in os.walk(root):
        visits.count(1 + len(folders) + len(files))
        yield from (Path(name) / entry for entry in files)


def _without_braces(pattern: str, visits: VisitLimit) -> Iterator[str]:
    found = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    for choice in found[1].split(","):
        visits.count(1)
        yield from _without_braces(pattern[: found.start()] + choice + pattern[found.end() :], visits)


def _matching(folder: str, parts: Sequence[str], visits: VisitLimit) -> Iterator[str]:
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == ANY_FOLDERS:
        yield from _below(folder, rest, visits, ())
    elif has_magic(first):
        for name, is_folder in _entries(folder, visits):
            if _matches_name(name, first) and (is_folder or not rest):
                yield from _matching(os.path.join(folder, name), rest, visits)
    else:
        visits.count(1)
        path = os.path.join(folder, first)
        if os.path.lexists(path):
            yield from _matching(path, rest, visits)


def _below(folder: str, rest: Sequence[str], visits: VisitLimit, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the matches of `**/` and the parts after it at every depth; do not follow links back to a parent."""
    real = os.path.realpath(folder or ".")
    if real in above:
        return
    yield from _matching(folder, rest, visits)
    for name, is_folder in _entries(folder, visits):
        if name.startswith("."):
            continue
        path = os.path.join(folder, name)
        if is_folder:
            yield from _below(path, rest, visits, (*above, real))
        elif not rest:
            yield path


def _entries(folder: str, visits: VisitLimit) -> list[tuple[str, bool]]:
    """Return (name, whether it is a folder) of each entry of a folder; an empty list if it cannot be read."""
    found = []
    try:
        with os.scandir(folder or ".") as entries:
            for entry in entries:
                visits.count(1)
                found.append((entry.name, _is_folder(entry)))
    except OSError:
        pass
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _matches_name(name: str, pattern: str) -> bool:
    """Match as glob does: a hidden file matches only a pattern that begins with a dot."""
    return (pattern.startswith(".") or not name.startswith(".")) and _compiled(pattern).match(name) is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))
