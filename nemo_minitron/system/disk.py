"""Error messages for failed disk operations: full or read-only disks, missing permissions, missing files."""

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
    "The disk is full; no partial file was kept.",
    f"Free space or set execution.run_root to another disk, {_AGAIN}",
)
_FORBIDDEN = ("No permission to write here.", "Set execution.run_root to a folder that you can write to.")
_UNREADABLE = ("No permission to access this.", f"Ask its owner for access, {_AGAIN}")
_BROKEN = ("The disk or its file server reports an error.", f"Check it (`dmesg`, `mount`), {_AGAIN}")
_NO_LOCKS = (
    "The file system does not support file locks.",
    "Set execution.run_root to one that does (Lustre: mounted with -o flock).",
)
_PROBLEMS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: ("The disk is read-only.", f"Make it writable or set execution.run_root to another folder, {_AGAIN}"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: ("A file exists where a folder is needed.", "Move it away, or set execution.run_root."),
    errno.EISDIR: ("A folder exists where a file is needed.", "Give the name of a file, or move the folder away."),
    errno.EEXIST: ("This path already exists.", "Move it away, or choose another name."),
    errno.ENAMETOOLONG: ("The name is too long for the file system.", "Choose a shorter name."),
    errno.ELOOP: ("The link points to itself.", "Repair or remove the link."),
    errno.EMFILE: ("This process has too many open files.", f"Raise the limit (`ulimit -n 65536`), {_AGAIN}"),
    errno.ENFILE: ("The machine has too many open files.", f"End the programs that keep them open, {_AGAIN}"),
    errno.ETXTBSY: ("The file is a program that is running.", f"Wait until it has ended, {_AGAIN}"),
    errno.EBUSY: ("The file is in use.", f"Wait until it is free, {_AGAIN}"),
    errno.ENOENT: ("A required file is missing.", f"If it was moved or deleted, put it back, {_AGAIN}"),
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
"""Messages of libraries about an incomplete write, for libraries that do not chain the operating system's error."""


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Convert errors of disk operations into a `MinitronError`.

    Args:
        root: path for the message when the error does not name a file.
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
    """Return the `MinitronError` for an error that is, or was caused by, a failed disk operation; otherwise None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            # The error of a failed copy contains the source as `filename` and the target as `filename2`.
            writes = _PROBLEMS.get(cause.errno) is _FULL and cause.filename2 is not None
            return _problem_of(cause.errno, cause.filename2 if writes else cause.filename, root)
        if _FULL_IN_WORDS.search(str(cause)):
            return _problem_of(errno.ENOSPC, None, root)
        cause = cause.__cause__
    return None


def _problem_of(code: int, filename: object, root: Path) -> MinitronError | None:
    known = _PROBLEMS.get(code)
    # ENOENT without a file name is a bug in this package, not a problem that the user can fix.
    if known is None or (code == errno.ENOENT and not isinstance(filename, str | os.PathLike)):
        return None
    where = str(filename or root)
    if known is _FORBIDDEN and not _are_nested(Path(where), root):
        known = _UNREADABLE
    what, next_step = known
    if code == errno.ENOENT and not Path(where).parent.is_dir():
        what, next_step = "The folder of this file does not exist.", "Create it, or choose another path."
    return EnvironmentProblem(what, where=where, next_step=next_step)


def _are_nested(file: Path, root: Path) -> bool:
    """Return whether one path is inside the other."""
    one, other = file.absolute(), root.absolute()
    return one.is_relative_to(other) or other.is_relative_to(one)
