"""What a disk refuses, as messages: full, read-only, forbidden, gone."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.errors import EnvironmentProblem, MinitronError

_AGAIN = "then run the same command again."
_FULL = (
    "The disk is full; nothing half-written was kept.",
    f"Free space or set execution.run_root to another disk, {_AGAIN}",
)
_FORBIDDEN = ("No permission to write here.", "Set execution.run_root to a folder of yours.")
_UNREADABLE = ("No permission to use this.", f"Ask its owner for access, {_AGAIN}")
_BROKEN = ("The disk, or its server, does not answer.", f"Look after it (`dmesg`, `mount`), {_AGAIN}")
_NO_LOCKS = (
    "The file system knows no file locks.",
    "Set execution.run_root to one that does (Lustre: mounted with -o flock).",
)
_PROBLEMS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: ("The disk is read-only.", f"Make it writable or set execution.run_root to another folder, {_AGAIN}"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: ("A file stands where a folder is needed.", "Move it away, or set execution.run_root."),
    errno.EISDIR: ("A folder stands where a file is needed.", "Name a file, or move the folder away."),
    errno.EEXIST: ("Something else stands where this goes.", "Move it away, or choose another name."),
    errno.ENAMETOOLONG: ("The name is too long for the file system.", "Choose a shorter one."),
    errno.ELOOP: ("The link leads back to itself.", "Repair or remove the link."),
    errno.EMFILE: ("Too many files are open.", f"Raise the limit (`ulimit -n 65536`), {_AGAIN}"),
    errno.ENFILE: ("The machine has too many open files.", f"End what opens them, {_AGAIN}"),
    errno.ETXTBSY: ("The file is in use as a program.", f"Wait until it has ended, {_AGAIN}"),
    errno.EBUSY: ("The file is in use.", f"Wait until it is free, {_AGAIN}"),
    errno.ENOENT: ("A file that is needed is gone.", f"Was it moved or deleted meanwhile? Put it back, {_AGAIN}"),
    errno.EIO: _BROKEN,
    errno.ESTALE: _BROKEN,
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOTSUP: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
}
_FULL_IN_WORDS = re.compile(
    r"No space left|Disk quota exceeded|os error (28|122)\b"  # safetensors, Megatron
    r"|\d+ requested and \d+ written"  # numpy
    r"|PytorchStreamWriter failed|inline_container\.cc:\d+\] \. unexpected pos"  # torch
)
"""How libraries tell of a write that was cut short, where they do not pass the system's error on."""


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn what the disk refuses into a message.

    Args:
        root: named where an error does not say which file it was.
    """
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        problem = disk_problem(error, root)
        if problem is None:
            raise
        raise problem from error


def disk_problem(error: BaseException, root: Path) -> MinitronError | None:
    """The message, when a disk is behind the error; libraries wrap it in errors of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            # A copy that fails names what it reads first, then where it writes.
            writes = _PROBLEMS.get(cause.errno) is _FULL and cause.filename2 is not None
            return _told(cause.errno, cause.filename2 if writes else cause.filename, root)
        if _FULL_IN_WORDS.search(str(cause)):
            return _told(errno.ENOSPC, None, root)
        cause = cause.__cause__
    return None


def _told(code: int, filename: object, root: Path) -> MinitronError | None:
    known = _PROBLEMS.get(code)
    # What is missing without being named is a mistake of ours.
    if known is None or (code == errno.ENOENT and not isinstance(filename, str | os.PathLike)):
        return None
    where = str(filename or root)
    if known is _FORBIDDEN and not _touch(Path(where), root):
        known = _UNREADABLE
    what, next_step = known
    if code == errno.ENOENT and not Path(where).parent.is_dir():
        what, next_step = "The folder of this file does not exist.", "Make it, or name a file elsewhere."
    return EnvironmentProblem(what, where=where, next_step=next_step)


def _touch(file: Path, root: Path) -> bool:
    """Whether one lies in the other."""
    one, other = file.absolute(), root.absolute()
    return one.is_relative_to(other) or other.is_relative_to(one)
