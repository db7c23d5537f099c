"""The licence that a model folder declares."""

from __future__ import annotations

from pathlib import Path

import yaml

from nemo_minitron.hf.links import require_inside


def read_license(model_dir: Path) -> str | None:
    """The `license:` of the model card's YAML header, or None."""
    card = model_dir / "README.md"
    if not card.is_file():
        return None
    require_inside(card, model_dir)
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    name = header.get("license") if isinstance(header, dict) else None
    return str(name) if name else None
