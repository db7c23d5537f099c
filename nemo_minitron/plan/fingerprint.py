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


_NEWER_KEYS = {"template_date": TEMPLATE_DATE.isoformat(), "compensation": None, "teacher_fp8": None}


def params_of(stage: StageParams) -> dict[str, Any]:
    """Return the keys of a stage that determine its output: all except its kind, its inputs and the loss guard."""
    left_out = {"kind": True, "inputs": True, "guard": True, "retraining": {"guard": True}}
    dump: dict[str, Any] = stage.model_dump(mode="json", exclude=left_out)  # type: ignore[arg-type]
    # Runs of older versions do not have these keys: their defaults must not change fingerprints.
    for key, default in _NEWER_KEYS.items():
        if key in dump and dump[key] == default:
            del dump[key]
    for section in (dump, dump.get("retraining") or {}):
        loss = section.get("loss")
        if isinstance(loss, dict) and loss.get("anchors", 0) is None:
            del loss["anchors"]
    return dump
