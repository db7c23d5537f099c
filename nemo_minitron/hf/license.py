"""The licence that a model folder declares."""

from __future__ import annotations

from pathlib import Path

import yaml

from nemo_minitron.config.bounded import safe_load
from nemo_minitron.limits import YAML_BYTES


def read_license(model_dir: Path) -> str | None:
    """The `license:` of the model card's YAML header, or None."""
    card = model_dir / "README.md"
    if not card.is_file():
        return None
    # The header comes first; the rest of a card may be long.
    with card.open(encoding="utf-8", errors="replace") as file:
        parts = file.read(YAML_BYTES.value()).split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header = safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    name = header.get("license") if isinstance(header, dict) else None
    return str(name) if name else None
