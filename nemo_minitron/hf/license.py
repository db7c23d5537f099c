"""License that a model folder declares."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from nemo_minitron.hf.links import require_inside
from nemo_minitron.limits import YAML_BYTES
from nemo_minitron.system.bounded import safe_load

_HEADER = re.compile(r"\s*^---[ \t]*$\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
"""YAML header of a model card, between two lines that contain only `---`."""


def read_license(model_dir: Path) -> str | None:
    """Return the value of `license:` in the model card's YAML header, or None."""
    card = model_dir / "README.md"
    if not card.is_file():
        return None
    require_inside(card, model_dir)
    # Only read the beginning: the header comes first, and the rest of a card may be long.
    with card.open(encoding="utf-8-sig", errors="replace") as file:
        found = _HEADER.match(file.read(YAML_BYTES.value()))
    if found is None:
        return None
    try:
        header = safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    name = header.get("license") if isinstance(header, dict) else None
    return str(name) if name else None
