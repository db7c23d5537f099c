"""Small, full and read-only disks. Only root may mount them; other users skip these tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class SmallDisk:
    """A file system in memory whose size can be set."""

    path: Path

    def leave(self, free_bytes: int) -> None:
        """Set its size so that about this much is free, in whole pages."""
        found = os.statvfs(self.path)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        _mount("-o", f"remount,size={max(PAGE, used + free_bytes)}", self.path)


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """Give it much free space, until `leave`."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", folder)
    try:
        yield SmallDisk(folder)
    finally:
        _unmount(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, for root too."""
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,ro,bind", folder)
        yield
    finally:
        _unmount(folder)


def _mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


def _unmount(folder: Path) -> None:
    # Lazily: a reader may still hold a file.
    subprocess.run(["umount", "-l", str(folder)], check=True)
