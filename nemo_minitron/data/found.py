"""Finding the files of a data source, which is a file, a folder or a glob pattern. Planner and stages share it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path

from nemo_minitron.data.blocks import COMPRESSIONS
from nemo_minitron.data.globs import VisitLimit, matches
from nemo_minitron.errors import DataError

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
CHAT_FORMATS = (".jsonl", ".json", ".parquet")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Metadata files of data sets on the Hugging Face hub; they hold no text."""
_HELD_OUT_NAMES = frozenset({"test", "valid", "validation", "val", "dev", "eval"})


@dataclass(frozen=True)
class Found:
    """Files of a source, in the order in which they are read."""

    files: list[Path]
    left_out: list[Path] = field(default_factory=list)
    """Files of unknown types, and links to a file that is read under another name."""
    held_out_folders: list[str] = field(default_factory=list)
    """Folders of `files` whose name is usual for held-out data, such as `test`."""

    def remarks(self) -> Iterator[str]:
        """Yield remarks on the selection for the user."""
        if self.left_out:
            count = len(self.left_out)
            yield f"{count} file{'s' * (count != 1)} left out, the first is {self.left_out[0]}"
        if self.held_out_folders:
            yield f"folders named {', '.join(self.held_out_folders)} are read as training text too"


def source_files(path: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Return the files of a source; see `find_files`."""
    return find_files(path, formats).files


def find_files(path: Path, formats: Sequence[str] = FORMATS) -> Found:
    """Return the files of a source: a file, a folder or a glob pattern.

    A folder is searched recursively; links are followed, and hidden files are skipped. The files are sorted, and
    each is listed once, however many links lead to it.

    Raises:
        DataError: there is no file, none in a known format, a folder that cannot be read, or a broken link.
    """
    if path.is_file():
        file_format(path, formats)
        return Found([path])
    listed = sorted(_below(path, VisitLimit(path)) if path.is_dir() else matches(path))
    present = _without_duplicates([file for file in listed if file.is_file()])
    files = [file for file in present if _is_text(file, formats)]
    broken = next((file for file in listed if _has_known_format(file, formats) and _is_broken_link(file)), None)
    if broken is not None:
        raise DataError(
            "The link is broken.",
            where=str(broken),
            next_step="Restore the file that it points to, or remove the link.",
        )
    if files:
        read = set(files)
        left_out = [file for file in listed if file.is_file() and file not in read]
        return Found(files, left_out, _held_out_folders(files, path))
    raise _no_text_error(path, present, formats)


def source_exists(path: Path) -> bool:
    """Return whether a file, folder or match of a glob pattern exists; file names may look like patterns."""
    return path.exists() or any(True for _ in matches(path))


def _no_text_error(path: Path, present: list[Path], formats: Sequence[str]) -> DataError:
    if present:
        return DataError(
            f"None of the {len(present)} files at {path} has a known type; the first is {present[0].name}.",
            allowed=_patterns(formats),
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


def _without_duplicates(files: Sequence[Path]) -> list[Path]:
    """Keep one path of each file: its real path if that is listed, otherwise the first."""
    real = {file: os.path.realpath(file) for file in files}
    names: dict[str, Path] = {}
    for file in files:
        if real[file] not in names or os.path.abspath(file) == real[file]:
            names[real[file]] = file
    return [file for file in files if names[real[file]] == file]


def _is_broken_link(file: Path) -> bool:
    """Return whether the path is a link to a missing file. Circular links count as duplicates and are not broken."""
    if not file.is_symlink():
        return False
    try:
        file.stat()
    except OSError as error:
        return error.errno == errno.ENOENT
    return False


def _held_out_folders(files: Iterable[Path], root: Path) -> list[str]:
    if not root.is_dir():
        return []
    names = {part for file in files for part in file.relative_to(root).parts[:-1]}
    return sorted(name for name in names if name.lower() in _HELD_OUT_NAMES)


# --- types ----------------------------------------------------------------------------------------


def file_format(file: Path, formats: Sequence[str] = FORMATS) -> str:
    """Return the suffix without that of a compression, e.g. `.jsonl` for rows.jsonl.zst.

    Raises:
        DataError: the suffix is none of the formats.
    """
    if not _has_known_format(file, formats):
        suffixes = "".join(file.suffixes[-2:]) or "(none)"
        raise DataError(f"Unknown file type {suffixes}.", where=str(file), allowed=_patterns(formats))
    return _without_compression(file).suffix.lower()


def _is_text(file: Path, formats: Sequence[str]) -> bool:
    return _has_known_format(file, formats) and file.name not in DESCRIPTIONS


def _has_known_format(file: Path, formats: Sequence[str]) -> bool:
    return _without_compression(file).suffix.lower() in formats


def _without_compression(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file


def _patterns(formats: Sequence[str]) -> str:
    return ", ".join(f"*{suffix}[{'|'.join(COMPRESSIONS)}]" for suffix in formats)
