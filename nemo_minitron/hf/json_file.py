"""Reading and writing of JSON files in model folders, with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.hf.file_content import damaged, require_content
from nemo_minitron.limits import CONFIG_BYTES, Limit, too_large
from nemo_minitron.system.shown import shown


def read_json_object(file: Path, limit: Limit = CONFIG_BYTES) -> dict[str, Any]:
    """Read the object in a JSON file in UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        CheckpointError: the file is unreadable, too large or not a JSON object, or a key has two different values.
    """
    require_content(file)
    try:
        if reason := too_large(file, limit):
            raise ValueError(reason)
        content = json.loads(file.read_bytes(), object_pairs_hook=_unique)
    except (OSError, ValueError) as error:
        raise damaged(file, error) from error
    except RecursionError as error:
        raise damaged(file, "it is nested too deeply") from error
    if not isinstance(content, dict):
        raise damaged(file, "it is not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, and refuse duplicate keys with different values, for which JSON readers disagree."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"key {shown(key)} occurs twice: {shown(found[key])} and {shown(value)}")
        found[key] = value
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented and with sorted keys."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
