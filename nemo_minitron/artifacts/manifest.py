"""manifest.json: inputs, outputs and provenance of a finished stage. It is written last and completes the artifact."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_minitron import __version__
from nemo_minitron.errors import ArtifactError
from nemo_minitron.system.disclosure import masked_command
from nemo_minitron.system.files import sealed, unsealed

MANIFEST_FILE = "manifest.json"
SCHEMA = 1
HASH_THREADS = 4
"""Number of hashing threads. One thread hashes about 1 GB/s; a network file system may read faster."""
_CHECKOUT, GIT_TIMEOUT_S = Path(__file__).parents[2], 20.0
_VERSIONS = ("torch", "megatron-core", "transformers", "safetensors", "lm_eval", "transformer-engine")


@dataclass(frozen=True)
class Manifest:
    """Record of one finished stage."""

    recipe: str
    stage: str
    kind: str
    fingerprint: str
    payload: Mapping[str, Any]
    """Values that the fingerprint is computed from, stored so that differences can be shown by field."""
    inputs: Mapping[str, Any]
    """Role -> name(s) of the input stages."""
    result: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Relative path -> {bytes, sha256}."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a published folder; None if there is none.

    Raises:
        ArtifactError: the manifest is damaged or has another schema.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        return Manifest(**unsealed(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"The manifest is damaged: {error}",
            where=str(file),
            next_step=f"Move {folder} away; the stage then runs again.",
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest with its own checksum, and flush it to disk."""
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump(sealed(asdict(manifest)), file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return relative path -> {bytes, sha256} of every file below a folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST_FILE]
    return {str(file.relative_to(folder)): facts for file, facts in file_facts(files).items()}


def file_facts(files: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """Return file -> {bytes, sha256}."""
    listed = list(files)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        found = zip(listed, pool.map(sha256_of, listed), strict=True)
        return {file: {"bytes": file.stat().st_size, "sha256": digest} for file, digest in found}


def sha256_of(file: Path) -> str:
    """Return the sha256 hex digest of a file of any size."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def provenance(started_s: float, earlier_s: float = 0.0) -> dict[str, Any]:
    """Return software versions, command and times of a stage, without host, user or override values.

    Provenance is never part of the fingerprint.

    Args:
        started_s: start in `time.monotonic` seconds, because the system clock may be changed while a stage runs.
        earlier_s: seconds of interrupted attempts, which count in `wall_s`.
    """
    wall_s = time.monotonic() - started_s
    return {
        "nemo_minitron": __version__,
        "versions": {name: found for name in _VERSIONS if (found := installed_version(name))},
        "python": platform.python_version(),
        "command": masked_command(sys.argv),
        "git_commit": _git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - wall_s)),
        "wall_s": round(earlier_s + wall_s, 3),
    }


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed as one (some containers only extend PYTHONPATH)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit(checkout: Path = _CHECKOUT) -> str | None:
    """Return the commit of the package's checkout, with `+` for uncommitted changes; None without a checkout.

    An installed package may lie below a repository of the user.
    """
    try:
        if not Path(_git(checkout, "rev-parse", "--show-toplevel")).samefile(checkout):
            return None
        commit, changes = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S
    )
    return done.stdout.strip()
