"""Writing a bundle as a plain tar file; the same content gives the same bytes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from nemo_minitron.bundle.items import Item, sorted_items
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.progress import Bar, Progress
from nemo_minitron.system.safe_files import replacing

SUFFIX = ".tar"
MANIFEST_FILE, SUMS_FILE, INSTALL_FILE = "manifest.json", "SHA256SUMS", "install.sh"
FORMAT = 1
MEMBER_TIME_S = 315532800
"""Modification time of all files of a bundle: 1980-01-01, the earliest date that zip files support."""
_BLOCK_BYTES = 1 << 20
_MEMBER_OVERHEAD_BYTES = 4096


def require_new(out: Path) -> None:
    """Raise EnvironmentProblem if `out` exists or a bundle cannot be written there."""
    if out.suffix != SUFFIX or not out.stem.strip("."):
        raise EnvironmentProblem(f"--out {out}: the file name of a bundle must be NAME{SUFFIX}.")
    if out.exists():
        raise EnvironmentProblem(f"{out} already exists.", next_step="Remove it, or choose another name.")
    if not out.absolute().parent.is_dir():
        raise EnvironmentProblem(
            f"There is no folder {out.absolute().parent}.", next_step="Create it, or choose another."
        )


def write_archive(out: Path, items: Iterable[Item], facts: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the items, `manifest.json` with `facts` and each file's sha256, and SHA256SUMS, all below one folder.

    The folder has the name of the archive without its suffix.

    Returns:
        The manifest's `files`, and sha256 and size_bytes of the archive.

    Raises:
        ConfigError: a file name is not allowed, or two files have the same name.
        EnvironmentProblem: there is not enough space, or a file cannot be read or changed while it was read.
    """
    require_new(out)
    try:
        content = sorted_items(items)
        total = sum(item.size_bytes for item in content)
        _require_space(out, total + _MEMBER_OVERHEAD_BYTES * len(content))
        with replacing(out) as file, progress.bar("bundle", total, "bytes") as bar:
            stream = _Hashed(file)
            with tarfile.open(fileobj=stream, mode="w|", bufsize=_BLOCK_BYTES, copybufsize=_BLOCK_BYTES) as tar:  # type: ignore[call-overload]
                files = [_add(tar, out.stem, item, bar) for item in content]
                _add_lists(tar, out.stem, facts, files)
    except OSError as error:
        raise _problem(error, out) from error
    return {"files": files, "sha256": stream.digest.hexdigest(), "size_bytes": out.stat().st_size}


def _add(tar: tarfile.TarFile, folder: str, item: Item, bar: Bar | None = None) -> dict[str, Any]:
    info = tarfile.TarInfo(f"{folder}/{item.member}")
    info.size, info.mtime = item.size_bytes, MEMBER_TIME_S
    info.mode = 0o755 if item.what == "script" else 0o644
    with io.BytesIO(item.content) if isinstance(item.content, bytes) else item.content.open("rb") as file:
        stream = _Hashed(file, bar)
        tar.addfile(info, stream)  # type: ignore[arg-type]
    return {"path": item.member, "size_bytes": info.size, "sha256": stream.digest.hexdigest(), "what": item.what}


def _add_lists(tar: tarfile.TarFile, folder: str, facts: Mapping[str, Any], files: Sequence[dict[str, Any]]) -> None:
    manifest = json.dumps({"format": FORMAT, **facts, "files": files}, indent=2) + "\n"
    listed = _add(tar, folder, Item(MANIFEST_FILE, manifest.encode(), "list"))
    lines = "".join(f"{file['sha256']}  {file['path']}\n" for file in [*files, listed])
    _add(tar, folder, Item(SUMS_FILE, lines.encode(errors="surrogateescape"), "list"))


class _Hashed:
    """File wrapper that hashes all bytes that are read or written."""

    def __init__(self, file: IO[bytes], bar: Bar | None = None) -> None:
        self.file, self.bar, self.digest = file, bar, hashlib.sha256()

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        if self.bar is not None:
            self.bar.advance(len(block))
        return block

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self.file.write(block)


def _require_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise _no_space(out, f"it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free.")


def _no_space(out: Path, how_much: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"There is not enough space for the bundle: {how_much}",
        where=str(out.absolute().parent),
        next_step="Free some space, or choose another disk with --out.",
    )


def _problem(error: OSError, out: Path) -> EnvironmentProblem:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _no_space(out, str(error))
    return EnvironmentProblem(
        f"The bundle cannot be written: {error}", where=str(out), next_step="The partial file was removed; try again."
    )
