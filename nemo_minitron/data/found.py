"""Which files a source stands for: a file, a folder or a glob pattern. Plan and stages ask the same function."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path

from nemo_minitron.data.blocks import COMPRESSIONS
from nemo_minitron.data.globs import Look, matches
from nemo_minitron.errors import DataError

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
CHAT_FORMATS = (".jsonl", ".json", ".parquet")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that lie beside a data set of the Hugging Face hub and hold no text."""
_HELD_OUT_NAMES = frozenset({"test", "valid", "validation", "val", "dev", "eval"})


@dataclass(frozen=True)
class Found:
    """The files of a source, in the order in which they are read."""

    files: list[Path]
    left_out: list[Path] = field(default_factory=list)
    """Files of unknown types, and other names of a file that is read."""
    held_out_folders: list[str] = field(default_factory=list)
    """Folders among them whose name says that they are no training text."""

    def remarks(self) -> Iterator[str]:
        """What a person should know about the choice."""
        if self.left_out:
            count = len(self.left_out)
            yield f"{count} file{'s' * (count != 1)} left out, the first is {self.left_out[0]}"
        if self.held_out_folders:
            yield f"folders named {', '.join(self.held_out_folders)} are read as training text too"


def source_files(path: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """As `find_files`, without the remarks."""
    return find_files(path, formats).files


def find_files(path: Path, formats: Sequence[str] = FORMATS) -> Found:
    """Files of a file, folder (searched below through links, sorted, hidden ones left out) or glob pattern.

    Each file is read once, however many links lead to it.

    Raises:
        DataError: nothing there, nothing in a known format, a folder that cannot be read, a link that leads nowhere.
    """
    if path.is_file():
        file_format(path, formats)
        return Found([path])
    listed = sorted(_below(path, Look(path)) if path.is_dir() else matches(path))
    present = _once([file for file in listed if file.is_file()])
    files = [file for file in present if _is_text(file, formats)]
    lost = next((file for file in listed if _known(file, formats) and _leads_nowhere(file)), None)
    if lost is not None:
        raise DataError(
            "The link leads nowhere.", where=str(lost), next_step="Bring back what it stands for, or remove the link."
        )
    if files:
        read = set(files)
        left_out = [file for file in listed if file.is_file() and file not in read]
        return Found(files, left_out, _held_out_folders(files, path))
    raise _nothing(path, present, formats)


def is_there(path: Path) -> bool:
    """Whether a file, folder or glob pattern stands for anything; a name may look like a pattern."""
    return path.exists() or any(True for _ in matches(path))


def _nothing(path: Path, present: list[Path], formats: Sequence[str]) -> DataError:
    if present:
        return DataError(
            f"{len(present)} files at {path}, none of a known type: the first is {present[0].name}.",
            allowed=_patterns(formats),
        )
    return DataError(
        f"No file matches {path}." if has_magic(str(path)) else f"There is no text at {path}.",
        allowed=f"a file, folder or glob of {_patterns(formats)}",
        next_step="Check the path; assets are fetched with `minitron assets fetch`.",
    )


# --- looking --------------------------------------------------------------------------------------


def _below(root: Path, look: Look) -> Iterator[Path]:
    """What lies in a folder and below, each real folder once. Its own folders come before those behind links."""
    waiting, seen = [root], set[str]()
    while waiting:
        links: list[Path] = []
        for folder in waiting:
            yield from _walk(folder, seen, links, look)
        waiting = sorted(links)


def _walk(root: Path, seen: set[str], links: list[Path], look: Look) -> Iterator[Path]:
    """Without following links to folders, which are added to `links`."""
    for name, folders, files in os.walk(root, onerror=_cannot_list):
        folder = Path(name)
        look.at(1 + len(folders) + len(files))
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        visible = [entry for entry in folders if not entry.startswith(".")]
        links += [folder / entry for entry in visible if (folder / entry).is_symlink()]
        folders[:] = [entry for entry in visible if not (folder / entry).is_symlink()]
        yield from (folder / entry for entry in files if not entry.startswith("."))


def _cannot_list(error: OSError) -> None:
    raise DataError(f"The folder cannot be read: {error.strerror}.", where=str(error.filename)) from error


def _once(files: Sequence[Path]) -> list[Path]:
    """One name of each file: its own where that is among them, else the first."""
    real = {file: os.path.realpath(file) for file in files}
    names: dict[str, Path] = {}
    for file in files:
        if real[file] not in names or os.path.abspath(file) == real[file]:
            names[real[file]] = file
    return [file for file in files if names[real[file]] == file]


def _leads_nowhere(file: Path) -> bool:
    """Whether it is a link without a target; links in a circle are other names of what is read."""
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
    """The suffix without that of a compression: `.jsonl` of rows.jsonl.zst.

    Raises:
        DataError: it is none of the formats.
    """
    if not _known(file, formats):
        suffixes = "".join(file.suffixes[-2:]) or "(none)"
        raise DataError(f"Unknown file type {suffixes}.", where=str(file), allowed=_patterns(formats))
    return _bare(file).suffix.lower()


def _is_text(file: Path, formats: Sequence[str]) -> bool:
    return _known(file, formats) and file.name not in DESCRIPTIONS


def _known(file: Path, formats: Sequence[str]) -> bool:
    return _bare(file).suffix.lower() in formats


def _bare(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file


def _patterns(formats: Sequence[str]) -> str:
    return ", ".join(f"*{suffix}[{'|'.join(COMPRESSIONS)}]" for suffix in formats)
