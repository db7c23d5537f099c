"""Files that bear a model file's name without being one: broken links, Git LFS pointers, web pages, empty files."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.errors import CheckpointError, shortened

_LFS = b"version https://git-lfs.github.com/spec"
_PAGES = (b"<!doctype html", b"<html")


def require_content(file: Path, *, may_be_empty: bool = False) -> None:
    """The file holds content of its own.

    Raises:
        CheckpointError: it is empty, a link to nothing, a Git LFS pointer, or a web page.
    """
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file.name} is a link to {file.readlink()}, which is not there.",
            where=str(file),
            next_step="Copy the folder with its links followed (cp -rL; rsync -L), or give the original folder.",
        )
    try:
        with file.open("rb") as stream:
            start = stream.read(200)
    except OSError as error:
        raise damaged(file, error) from error
    if not start and not may_be_empty:
        raise damaged(file, "it is empty")
    if start.startswith(_LFS):
        raise CheckpointError(
            f"{file.name} is a Git LFS pointer: a note of where the file is, not the file.",
            where=str(file),
            next_step="Run `git lfs pull` in the repository, or download the file from the hub.",
        )
    if file.suffix != ".html" and start.lstrip().lower().startswith(_PAGES):
        raise CheckpointError(
            f"{file.name} is a web page, not the file.",
            where=str(file),
            next_step="Download the file itself: on the hub, /resolve/ in the address instead of /blob/.",
        )


def damaged(file: Path, why: object) -> CheckpointError:
    """The error for a file that is there and cannot be read."""
    return CheckpointError(
        f"{file.name} is damaged or cut off: {shortened(why)}",
        where=str(file),
        next_step="Download or copy the file again; compare its size with the source's.",
    )
