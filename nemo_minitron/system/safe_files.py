"""Safe writing into run folders: no link in a run folder can redirect a write to a file elsewhere.

A run folder may come from another person or be writable by others. All writes into it go through this module: links are
not followed, temporary names cannot be guessed, and files are replaced rather than overwritten.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nemo_minitron.errors import ArtifactError

_PRIVATE, ROOT_MODE = 0o600, 0o775
"""Modes of private files and, before the umask is applied, of a run folder, which is never writable by every user."""
_NAME_CHARACTERS = 40
TEMPORARY = ".partial"
"""Suffix of temporary names, which begin with a dot and the name of the final file."""
_LINK_ERRORS = (errno.ELOOP, errno.EMLINK, getattr(errno, "EFTYPE", errno.ELOOP))
"""Error codes of O_NOFOLLOW for a link: ELOOP on Linux, others on BSD."""


def write_whole(file: Path, text: str, *, private: bool = False) -> None:
    """Replace a file atomically: readers see the old text or the new one, and a full disk keeps the old one.

    Several processes may write at the same time; the last one wins. A link of this name is replaced, not followed.

    Args:
        private: make the file readable by its owner only (0600); otherwise the umask decides.
    """
    with replacing(file, private=private) as out:
        out.write(text.encode())


@contextmanager
def replacing(file: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Open a new file in the folder of `file`, and rename it to `file` when the block ends without an error."""
    with _errors_name(file):
        prefix = f".{file.name[:_NAME_CHARACTERS]}."
        number, name = tempfile.mkstemp(dir=file.parent, prefix=prefix, suffix=TEMPORARY)
    partial = Path(name)
    try:
        with open(number, "wb") as out:
            if not private:
                os.fchmod(number, 0o666 & ~umask())
            yield out
        with _errors_name(file):
            partial.replace(file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def _errors_name(file: Path) -> Iterator[None]:
    """Replace the temporary name in errors with the name of the requested file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`, and rename it to `target` when the block ends without an error.

    Nothing is left behind after an error or an interrupt, so the same command can be repeated.

    Args:
        replace: remove what `target` is at that time.
    """
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:_NAME_CHARACTERS]}.", suffix=TEMPORARY))
    try:
        yield partial
        partial.chmod(0o777 & ~umask())
        if replace and target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file into a run folder atomically, like `write_whole`."""
    with source.open("rb") as read, replacing(target) as out:
        shutil.copyfileobj(read, out)


def open_log(file: Path, *, append: bool = True, private: bool = False) -> IO[str]:
    """Open a text file of a run for writing, and truncate it unless `append`.

    Raises:
        ArtifactError: the path is a link, has a second hard link, or is not a regular file.
    """
    return open(_write_only(file, append=append, private=private), "a", encoding="utf-8")


def open_lock(file: Path) -> IO[str]:
    """Open a lock file for reading and writing. Create it if it is missing, and keep its contents.

    Raises:
        ArtifactError: see `open_log`.
    """
    return open(_opened(file, os.O_RDWR, _PRIVATE), "r+", encoding="utf-8", errors="replace")


def write_reserved(file: Path, content: bytes) -> None:
    """Overwrite a file that reserves disk space, so that the write succeeds on a full disk.

    Raises:
        ArtifactError: see `open_log`.
    """
    with open(_opened(file, os.O_WRONLY, 0o666), "wb", buffering=0) as out:
        out.write(content)
        out.truncate()


def write_new(file: Path, text: str, *, private: bool = True) -> None:
    """Write a new file.

    Raises:
        FileExistsError: the path exists, even as a link to nothing.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(file, flags, _PRIVATE if private else 0o666), "w", encoding="utf-8") as out:
        out.write(text)


def own_folder(root: Path, *names: str, mode: int = 0o777) -> Path:
    """Return a folder below a run's root, and create it if it is missing. The path of the root may contain links.

    Raises:
        ArtifactError: one of the names below the root is a link.
    """
    root.mkdir(mode=ROOT_MODE, parents=True, exist_ok=True)
    folder = root
    for name in names:
        folder = folder / name
        with suppress(FileExistsError):
            folder.mkdir(mode=mode)
        require_real_folder(folder)
    return folder


def require_real_folder(folder: Path) -> None:
    """Refuse a link in place of a folder of the run. A missing folder is accepted.

    Raises:
        ArtifactError: the path is a link.
    """
    if folder.is_symlink():
        raise link_error(folder)


def link_error(path: Path) -> ArtifactError:
    """Return the error for a link in a run folder at a path that the run would write to."""
    target: Any = "elsewhere"
    with suppress(OSError):
        target = path.readlink()
    return ArtifactError(
        f"{path.name} is a link to {target}; a run follows no links in its folder, so that its writes cannot be "
        "redirected to other files.",
        where=str(path),
        next_step="Remove the link. To have a run on another disk, set execution.run_root.",
    )


def _write_only(file: Path, *, append: bool, private: bool) -> int:
    number = _opened(file, os.O_WRONLY | os.O_APPEND, _PRIVATE if private else 0o666)
    try:
        if not append:
            os.ftruncate(number, 0)
    except BaseException:
        os.close(number)
        raise
    return number


def _opened(file: Path, flags: int, mode: int) -> int:
    """Open a descriptor, and verify that it is a regular file with one hard link before anything is changed."""
    # Without O_NONBLOCK, opening a named pipe would block forever.
    safe = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        number = os.open(file, flags | safe, mode)
    except OSError as error:
        if error.errno in _LINK_ERRORS and file.is_symlink():
            raise link_error(file) from None
        if error.errno == errno.ENXIO:
            raise _no_file(file) from None
        raise
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(number)
        raise _no_file(file)
    return number


def _no_file(file: Path) -> ArtifactError:
    return ArtifactError(
        f"{file.name} is not a regular file of this run: it is a device, a pipe, or a hard link to a file elsewhere.",
        where=str(file),
        next_step="Remove it, and run the same command again.",
    )


def umask() -> int:
    """Return this process's umask. Without /proc the only way to read it is to set it briefly."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    found = os.umask(0o077)
    os.umask(found)
    return found
