"""Small JSON files with checksums, paths that users write, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.errors import ArtifactError, EnvironmentProblem
from nemo_minitron.system.safe_files import write_whole

__all__ = ["SEAL", "cache_dir", "read_json", "sealed", "unsealed", "user_path", "write_whole"]

SEAL = "sha256"


def read_json(file: Path, next_step: str) -> Any:
    """Read a JSON file of a run.

    Args:
        next_step: advice for the error message.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file.name} is damaged: {error}", where=str(file), next_step=next_step) from error


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts as JSON values, with their checksum under the key `SEAL`."""
    plain = json.loads(json.dumps(facts))
    return {**plain, SEAL: _digest(plain)}


def unsealed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Verify and remove the checksum of facts from `sealed`. Files of older versions have none.

    Raises:
        ValueError: the facts do not match their checksum.
    """
    facts = {key: value for key, value in found.items() if key != SEAL}
    if SEAL in found and found[SEAL] != _digest(facts):
        raise ValueError("its contents do not match its checksum")
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def user_path(text: str | Path) -> Path:
    """Expand `~` and `~name` in a path that a user wrote.

    Raises:
        EnvironmentProblem: the home folder of that user is unknown.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise EnvironmentProblem(
            f"{text}: the home folder that ~ stands for is unknown.",
            next_step="Write the full path, or set HOME.",
        ) from None


def cache_dir() -> Path:
    """Return the folder of cached environments and wheels. It can be deleted whenever no run is active."""
    return Path(os.environ.get("XDG_CACHE_HOME") or user_path("~/.cache")) / "nemo-minitron"
