"""Files and folders of a run, opened so that no link in it leads a write to a file elsewhere.

A run folder may come from somebody else, or lie where others can write. Whatever is written there goes through this
module: links are not followed, temporary names cannot be guessed, and files are replaced, never overwritten.
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
"""Of files for this user alone, and of a run's folder, from which the umask is taken: never open to every user."""
_NAME_CHARACTERS = 40
TEMPORARY = ".partial"
"""The end of temporary names; they begin with a dot and the name of the file that they will be."""
_LINK_ERRORS = (errno.ELOOP, errno.EMLINK, getattr(errno, "EFTYPE", errno.ELOOP))
"""What O_NOFOLLOW gives for a link: ELOOP on Linux, other codes on BSD."""


def write_whole(file: Path, text: str, *, private: bool = False) -> None:
    """Replace a file: a reader finds the old text or the new one, never a part, and a full disk leaves the old one.

    Several processes may write at the same time; the last one wins. A link of that name is replaced, not followed.

    Args:
        private: nobody else may read it (0600); else the umask decides.
    """
    with replacing(file, private=private) as out:
        out.write(text.encode())


@contextmanager
def replacing(file: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """A stream into a new file beside `file`, which takes its place when the block ends without an error."""
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
    """Errors name the file that is asked for: nobody knows the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file to a name in a run folder, as `write_whole` writes one."""
    with source.open("rb") as read, replacing(target) as out:
        shutil.copyfileobj(read, out)


def open_log(file: Path, *, append: bool = True, private: bool = False) -> IO[str]:
    """A text file of a run to write into, emptied first unless `append`.

    Raises:
        ArtifactError: the name is a link, has a second name elsewhere, or is no file.
    """
    return open(_write_only(file, append=append, private=private), "a", encoding="utf-8")


def open_lock(file: Path) -> IO[str]:
    """A file to hold a lock on, read and written; made when it is missing, and left as it is.

    Raises:
        ArtifactError: as `open_log`.
    """
    return open(_opened(file, os.O_RDWR, _PRIVATE), "r+", encoding="utf-8", errors="replace")


def write_reserved(file: Path, content: bytes) -> None:
    """Write into the room that a file has kept: a full disk has no other.

    Raises:
        ArtifactError: as `open_log`.
    """
    with open(_opened(file, os.O_WRONLY, 0o666), "wb", buffering=0) as out:
        out.write(content)
        out.truncate()


def write_new(file: Path, text: str, *, private: bool = True) -> None:
    """Write a file that must not be there yet, not even as a link.

    Raises:
        FileExistsError: it is.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(file, flags, _PRIVATE if private else 0o666), "w", encoding="utf-8") as out:
        out.write(text)


def own_folder(root: Path, *names: str, mode: int = 0o777) -> Path:
    """A folder below a run's root, made when it is missing. The root itself may be reached through links.

    Raises:
        ArtifactError: one of the names below the root is a link, or no folder.
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
    """Refuse a link where a run has a folder of its own.

    Raises:
        ArtifactError: it is a link. Nothing there is not an error.
    """
    if folder.is_symlink():
        raise link_error(folder)


def link_error(path: Path) -> ArtifactError:
    """The error for a link in a run folder where the run would write."""
    target: Any = "elsewhere"
    with suppress(OSError):
        target = path.readlink()
    return ArtifactError(
        f"{path.name} is a link to {target}; a run follows no links in its folder, so that nobody can lead its writes "
        "to other files.",
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
    """A descriptor of a plain file with one name; nothing is changed before that is certain."""
    # Without O_NONBLOCK a pipe of this name would let the run wait for ever.
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
        f"{file.name} is not a plain file of this run: it is a device, a pipe, or another name of a file elsewhere.",
        where=str(file),
        next_step="Remove it, and run the same command again.",
    )


def umask() -> int:
    """This process's umask; where the system does not tell, it is set for a moment to learn it."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    found = os.umask(0o077)
    os.umask(found)
    return found
