"""The identity of a stage's output: what was asked for and what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nemo_minitron.schema.base import TEMPLATE_DATE, StageParams


def canonical_json(value: Any) -> str:
    """JSON with sorted keys. Raises TypeError on anything that has no stable text (objects, NaN)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise TypeError(f"no stable fingerprint: {error}") from error


def fingerprint(payload: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Fields that differ, as `path: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        out = []
        for key in sorted(old.keys() | new.keys()):
            out += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return out
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


def params_of(stage: StageParams) -> dict[str, Any]:
    """The part of a stage's keys that decides its output: not its kind, its inputs, nor when training gives up."""
    left_out = {"kind": True, "inputs": True, "guard": True, "retraining": {"guard": True}}
    dump: dict[str, Any] = stage.model_dump(mode="json", exclude=left_out)  # type: ignore[arg-type]
    if dump.get("template_date") == TEMPLATE_DATE.isoformat():
        # The key is newer than many runs; at its default it leaves their fingerprints as they are.
        del dump["template_date"]
    return dump
