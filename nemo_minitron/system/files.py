"""Small files that others may read at any moment, and that tell when they were damaged; where caches are."""

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
    """The contents of a JSON file of a run.

    Raises:
        ArtifactError: it is damaged; with what to do then.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file.name} is damaged: {error}", where=str(file), next_step=next_step) from error


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts, as JSON has them, with their own checksum."""
    plain = json.loads(json.dumps(facts))
    return {**plain, SEAL: _digest(plain)}


def unsealed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without their checksum; those of older versions have none.

    Raises:
        ValueError: they were changed since they were sealed.
    """
    facts = {key: value for key, value in found.items() if key != SEAL}
    if SEAL in found and found[SEAL] != _digest(facts):
        raise ValueError("its own checksum is another one")
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def user_path(text: str | Path) -> Path:
    """A path as a person writes it: `~` and `~name` are expanded.

    Raises:
        EnvironmentProblem: that user has no home folder here.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise EnvironmentProblem(
            f"{text}: nobody knows the home folder that ~ stands for.",
            next_step="Write the whole path, or set HOME.",
        ) from None


def cache_dir() -> Path:
    """Environments and wheels; may be removed at any time that nothing runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or user_path("~/.cache")) / "nemo-minitron"
