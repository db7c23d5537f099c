"""Ownership checks of run folders. Their contents decide which programs run, so no other user may write there."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from nemo_minitron.errors import ArtifactError
from nemo_minitron.system.safe_files import umask

TRUST_VARIABLE = "MINITRON_TRUSTED_FOLDERS"
"""Environment variable with folders, separated by colons, in which the user trusts everybody who can write. It is not a
recipe key because recipes may come from other people."""
_GROUP, _OTHERS = stat.S_IWGRP, stat.S_IWOTH
_NOT_REACHED = stat.S_IXGRP | stat.S_IXOTH


def work_mode() -> int:
    """Return the mode of the folder `.work`: closed to other users if the umask would let them write below it."""
    return 0o777 if umask() & (_GROUP | _OTHERS) == _GROUP | _OTHERS else 0o700


def require_own(folder: Path, *, shared: bool = False) -> None:
    """Refuse a folder that another user owns or can write to.

    Args:
        shared: accept a folder that a group can write to. Its contents are then not trusted because of their location.

    Raises:
        ArtifactError: names the other user or group, and how to accept the folder.
    """
    if is_trusted(folder):
        return
    problem = _problem(folder.stat(), shared=shared)
    if problem is not None and _modes_mean_something(folder):
        raise _not_own(folder, folder, problem)


def require_own_tree(folder: Path, *, below: Path) -> None:
    """Apply `require_own` to everything in a folder. A missing folder is accepted.

    Args:
        below: a parent folder. If others cannot enter it, the modes below it do not matter.
    """
    if is_trusted(folder) or not folder.exists():
        return
    closed = not below.stat().st_mode & _NOT_REACHED
    for path in _everything(folder):
        with suppress(FileNotFoundError):  # another node may delete files meanwhile
            found = path.lstat()
            is_link = stat.S_ISLNK(found.st_mode)
            problem = _link_problem(path, found, folder) if is_link else _problem(found, closed=closed)
            if problem is not None and _modes_mean_something(folder):
                raise _not_own(path, folder, problem)


def is_trusted(folder: Path) -> bool:
    """Return whether MINITRON_TRUSTED_FOLDERS contains the folder or one of its parents."""
    named = [Path(os.path.expanduser(name)) for name in os.environ.get(TRUST_VARIABLE, "").split(os.pathsep) if name]
    real = folder.resolve()
    return any(real.is_relative_to(trusted.resolve()) for trusted in named)


def _everything(folder: Path) -> list[Path]:
    found = [folder]
    for name, folders, files in os.walk(folder):
        found += [Path(name) / entry for entry in (*folders, *files)]
    return found


def _problem(found: os.stat_result, *, shared: bool = False, closed: bool = False) -> str | None:
    """Describe which other users could have changed a file or folder; None: no other user."""
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to {_user(found.st_uid)}"
    if closed:
        return None
    # In a folder with the sticky bit, such as /tmp, others can add files but not change existing ones.
    if found.st_mode & _OTHERS and not (shared and found.st_mode & stat.S_ISVTX):
        return "can be written by every user"
    if found.st_mode & _GROUP and not shared and not _is_private_group(found.st_gid):
        return f"can be written by the group {_group(found.st_gid)}"
    return None


def _link_problem(link: Path, found: os.stat_result, folder: Path) -> str | None:
    """Describe why a link is refused. Links of this user within the folder are accepted: trackers link the last run."""
    if found.st_uid not in (os.geteuid(), 0):
        return f"is a link of {_user(found.st_uid)}"
    return None if link.resolve().is_relative_to(folder.resolve()) else f"is a link to {os.readlink(link)}"


def _is_private_group(gid: int) -> bool:
    """Return whether this user is the only member of the group, as with one group per user of the same name."""
    if gid == 0 and os.geteuid() == 0:
        return True
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and user.pw_gid == gid and set(group.gr_mem) <= {user.pw_name}


def _modes_mean_something(folder: Path) -> bool:
    """Return whether a new private folder is reported as owned by this user and closed to others.

    Some file systems report every file as another user's or as writable by all: exports that squash root, mounts of
    other operating systems.
    """
    with suppress(OSError), tempfile.TemporaryDirectory(dir=folder, prefix=".owner-") as made:
        found = os.stat(made)
        return found.st_uid in (os.geteuid(), 0) and not found.st_mode & (_GROUP | _OTHERS)
    return True


def _user(uid: int) -> str:
    with suppress(KeyError):
        return f"the user {pwd.getpwuid(uid).pw_name}"
    return f"the user with the id {uid}"


def _group(gid: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


def _not_own(path: Path, folder: Path, problem: str) -> ArtifactError:
    closable = problem.startswith("can be written")
    close = f"If nobody else has changed anything there: chmod -R go-w {folder}. " if closable else ""
    return ArtifactError(
        f"{path.name} {problem}: a run does not use files that other users could have written.",
        where=str(path),
        next_step=f"{close}Choose another name (name=...) or execution.run_root; or, if you trust everybody who can "
        f"write there: export {TRUST_VARIABLE}={folder.resolve()}",
    )
