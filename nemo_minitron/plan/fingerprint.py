"""The identity of a stage's output: its keys and the inputs from which it is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nemo_minitron.schema.base import TEMPLATE_DATE, StageParams


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys. Raise TypeError for values without a stable representation (objects, NaN)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise TypeError(f"the value has no stable fingerprint: {error}") from error


def fingerprint(payload: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON as 64 hex digits."""
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List the fields that differ, each as `path: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        out = []
        for key in sorted(old.keys() | new.keys()):
            out += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return out
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


_NEWER_KEYS: dict[str, Any] = {
    "template_date": TEMPLATE_DATE.isoformat(),
    "compensation": None,
    "teacher_fp8": None,
    "loss.anchors": None,
}
"""Keys of stages that runs of older versions do not have, with dots for sections, and their defaults, which must not
change fingerprints. They also apply inside `retraining`, which has the keys of a training."""


def params_of(stage: StageParams) -> dict[str, Any]:
    """Return the keys of a stage that determine its output: all except its kind, its inputs and the loss guard."""
    left_out = {"kind": True, "inputs": True, "guard": True, "retraining": {"guard": True}}
    dump: dict[str, Any] = stage.model_dump(mode="json", exclude=left_out)  # type: ignore[arg-type]
    for path, default in _NEWER_KEYS.items():
        for section in (dump, dump.get("retraining")):
            _drop_default(section, path, default)
    return dump


def _drop_default(section: Any, path: str, default: Any) -> None:
    """Remove the key at a dotted path if it is there and has this value."""
    *names, key = path.split(".")
    for name in names:
        section = section.get(name) if isinstance(section, dict) else None
    if isinstance(section, dict) and key in section and section[key] == default:
        del section[key]
