"""Finding the files of a data source, which is a file, a folder or a glob pattern. Planner and stages share it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from itertools import takewhile
from operator import eq
from pathlib import Path

from nemo_minitron.data.blocks import COMPRESSIONS
from nemo_minitron.data.globs import ANY_FOLDERS, VisitLimit, matches
from nemo_minitron.errors import DataError

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
CHAT_FORMATS = (".jsonl", ".json", ".parquet")
FORMATS_OF = {"text": FORMATS, "chats": CHAT_FORMATS}
"""Content of a source of a stage -> formats that its stage reads. A source of other content is read as it is."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Metadata files of data sets on the Hugging Face hub; they hold no text."""
_HELD_OUT_NAMES = frozenset({"test", "valid", "validation", "val", "dev", "eval"})
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Found:
    """Files of a source, in the order in which they are read."""

    files: list[Path]
    left_out: list[Path] = field(default_factory=list)
    """Files that are not read because their type is unknown."""
    folders_left_out: list[Path] = field(default_factory=list)
    """Folders that match the glob pattern; they are not searched."""
    held_out: list[Path] = field(default_factory=list)
    """Files whose name, or that of a folder, is usual for held-out data, such as `test`; not if the source names it."""

    def remarks(self) -> Iterator[str]:
        """Yield remarks on the selection for the user."""
        if self.left_out:
            yield f"{_counted(self.left_out, 'file')} left out, the first is {self.left_out[0]}"
        if self.folders_left_out:
            yield (
                f"{_counted(self.folders_left_out, 'folder')} left out, the first is {self.folders_left_out[0]}; "
                "end the pattern in /** to read folders"
            )
        if self.held_out:
            yield (
                f"{_counted(self.held_out, 'file')} named like held-out data, read like the others; "
                f"the first is {self.held_out[0]}"
            )


def source_files(path: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Return the files of a source; see `find_files`."""
    return find_files(path, formats).files


def find_files(path: Path, formats: Sequence[str] = FORMATS) -> Found:
    """Return the files of a source: a file, a folder or a glob pattern.

    A folder is searched recursively; links are followed, and hidden files are skipped. The files are sorted, and
    each is listed once, however many links lead to it.

    Raises:
        DataError: there is no file, none in a known format, a folder that cannot be read, a broken link, or a file
            beside its compressed copy.
    """
    if path.is_file():
        file_format(path, formats)
        return Found([path])
    listed = sorted(_below(path, VisitLimit(path)) if path.is_dir() else matches(path))
    present = [file for file in listed if file.is_file()]
    real = {file: os.path.realpath(file) for file in present}
    # First the type, then the links: a cache of the Hugging Face hub has links with a suffix to files without one.
    files = _without_duplicates([file for file in present if _is_text(file, formats)], real)
    broken = next((file for file in listed if _has_known_format(file, formats) and _is_broken_link(file)), None)
    if broken is not None:
        raise DataError(
            "The link is broken.",
            where=str(broken),
            next_step="Restore the file that it points to, or remove the link.",
        )
    folders = _folders_left_out(path, listed)
    if not files:
        raise _no_text_error(path, present, folders, formats)
    _require_one_copy(files)
    read = {real[file] for file in files}
    left_out = [file for file in present if real[file] not in read]
    return Found(files, left_out, folders, [file for file in files if _looks_held_out(file, path)])


def source_exists(path: Path) -> bool:
    """Return whether a file, folder or match of a glob pattern exists; file names may look like patterns."""
    return path.exists() or any(True for _ in matches(path))


def without_compression(file: Path) -> Path:
    """Return the path without the suffix of a compression."""
    return file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file


def _require_one_copy(files: Iterable[Path]) -> None:
    """Refuse a file and its compressed copy in one folder, which would be the same text twice."""
    copies: dict[Path, Path] = {}
    for file in files:
        other = copies.setdefault(without_compression(file), file)
        if other != file:
            raise DataError(
                f"{other.name} and {file.name} are copies of one file, so its text would be read twice.",
                where=str(file),
                next_step="Remove one of them, or use a pattern that matches one, such as *.jsonl.zst.",
            )


def _no_text_error(path: Path, present: list[Path], folders: list[Path], formats: Sequence[str]) -> DataError:
    if present:
        return DataError(
            f"None of the {len(present)} files at {path} has a known type; the first is {present[0].name}.",
            allowed=_patterns(formats),
        )
    if folders:
        return DataError(
            f"Only folders match {path}; the first is {folders[0].name}.",
            allowed=f"a file, folder or glob of {_patterns(formats)}",
            next_step="Name the folder, or end the pattern in /**.",
        )
    return DataError(
        f"No file matches {path}." if has_magic(str(path)) else f"There is no text at {path}.",
        allowed=f"a file, folder or glob of {_patterns(formats)}",
        next_step="Check the path; `minitron assets fetch` downloads assets.",
    )


# --- searching ------------------------------------------------------------------------------------


def _below(root: Path, visits: VisitLimit) -> Iterator[Path]:
    """Yield all files below a folder. Each real folder is visited once; real folders come before linked ones."""
    waiting, seen = [root], set[str]()
    while waiting:
        links: list[Path] = []
        for folder in waiting:
            yield from _walk(folder, seen, links, visits)
        waiting = sorted(links)


def _walk(root: Path, seen: set[str], links: list[Path], visits: VisitLimit) -> Iterator[Path]:
    """Yield the files below a folder without following links to folders; add those links to `links`."""
    for name, folders, files in os.walk(root, onerror=_unreadable_folder):
        folder = Path(name)
        visits.count(1 + len(folders) + len(files))
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        visible = [entry for entry in folders if not entry.startswith(".")]
        links += [folder / entry for entry in visible if (folder / entry).is_symlink()]
        folders[:] = [entry for entry in visible if not (folder / entry).is_symlink()]
        yield from (folder / entry for entry in files if not entry.startswith("."))


def _unreadable_folder(error: OSError) -> None:
    raise DataError(f"The folder cannot be read: {error.strerror}.", where=str(error.filename)) from error


def _without_duplicates(files: Sequence[Path], real: Mapping[Path, str]) -> list[Path]:
    """Keep one path of each file: its real path if that is listed, otherwise the first."""
    names: dict[str, Path] = {}
    for file in files:
        if real[file] not in names or os.path.abspath(file) == real[file]:
            names[real[file]] = file
    return [file for file in files if names[real[file]] == file]


def _folders_left_out(pattern: Path, listed: Sequence[Path]) -> list[Path]:
    """Return the folders that match a glob pattern although nothing below them does."""
    if pattern.is_dir() or pattern.name == ANY_FOLDERS:
        return []
    searched = {folder for entry in listed for folder in entry.parents}
    return [entry for entry in listed if entry not in searched and entry.is_dir()]


def _is_broken_link(file: Path) -> bool:
    """Return whether the path is a link to a missing file. Circular links count as duplicates and are not broken."""
    if not file.is_symlink():
        return False
    try:
        file.stat()
    except OSError as error:
        return error.errno == errno.ENOENT
    return False


def _looks_held_out(file: Path, source: Path) -> bool:
    """Return whether a folder has a usual name of held-out data, or the file begins with one.

    Parts of the path that are in the source too do not count, nor do names that a pattern contains.
    """
    shared = sum(1 for _ in takewhile(bool, map(eq, file.parts, source.parts)))
    *folders, name = (part.lower() for part in file.parts[shared:])
    words = {*folders, *_WORD.findall(name)[:1]} & _HELD_OUT_NAMES
    return bool(words.difference(*(_WORD.findall(part.lower()) for part in source.parts[shared:])))


def _counted(paths: Sequence[Path], word: str) -> str:
    return f"{len(paths)} {word}{'s' * (len(paths) != 1)}"


# --- types ----------------------------------------------------------------------------------------


def file_format(file: Path, formats: Sequence[str] = FORMATS) -> str:
    """Return the suffix without that of a compression, e.g. `.jsonl` for rows.jsonl.zst.

    Raises:
        DataError: the suffix is none of the formats.
    """
    if not _has_known_format(file, formats):
        suffixes = "".join(file.suffixes[-2:]) or "(none)"
        raise DataError(f"Unknown file type {suffixes}.", where=str(file), allowed=_patterns(formats))
    return without_compression(file).suffix.lower()


def _is_text(file: Path, formats: Sequence[str]) -> bool:
    return _has_known_format(file, formats) and file.name not in DESCRIPTIONS


def _has_known_format(file: Path, formats: Sequence[str]) -> bool:
    return without_compression(file).suffix.lower() in formats


def _patterns(formats: Sequence[str]) -> str:
    return ", ".join(f"*{suffix}[{'|'.join(COMPRESSIONS)}]" for suffix in formats)
