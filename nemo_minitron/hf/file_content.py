"""Detection of placeholders in place of model files: broken links, Git LFS pointers, web pages, empty files."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.errors import CheckpointError, shortened

_LFS = b"version https://git-lfs.github.com/spec"
_PAGES = (b"<!doctype html", b"<html")


def require_content(file: Path, *, may_be_empty: bool = False) -> None:
    """Check that a file has its own content.

    Raises:
        CheckpointError: the file is empty, a broken link, a Git LFS pointer, or a web page.
    """
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file.name} is a link to {file.readlink()}, which does not exist.",
            where=str(file),
            next_step="Copy the folder again and follow its links (cp -rL; rsync -L), or use the original folder.",
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
            f"{file.name} is a Git LFS pointer, not the file itself.",
            where=str(file),
            next_step="Run `git lfs pull` in the repository, or download the file from the hub.",
        )
    if file.suffix != ".html" and start.lstrip().lower().startswith(_PAGES):
        raise CheckpointError(
            f"{file.name} is a web page, not the file itself.",
            where=str(file),
            next_step="Download the file itself: on the hub, replace /blob/ in the URL with /resolve/.",
        )


def damaged(file: Path, why: object) -> CheckpointError:
    """Return the error for an existing file that cannot be read."""
    return CheckpointError(
        f"{file.name} is damaged or cut off: {shortened(why)}",
        where=str(file),
        next_step="Download or copy the file again, and compare its size with that of the source.",
    )
