"""Every key of a recipe with its default, frozen: a missing key or another default breaks recipes.

After a deliberate change, `make reference` writes the list again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nemo_minitron.config.keys import sections_in, stage_classes
from nemo_minitron.schema.execution import Execution

FROZEN = Path(__file__).with_name("recipe_keys.txt")


def keys() -> list[str]:
    """`key = default` for every key, those of sections inside others once for each place."""
    roots = {f"stages.<{kind}>": model for kind, model in stage_classes().items()} | {"execution": Execution}
    return sorted(line for root, model in roots.items() for line in _keys(root, model, ()))


def _keys(path: str, model: type[BaseModel], inside: tuple[type[BaseModel], ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        required = field.is_required()
        value: Any = None if required else field.get_default(call_default_factory=True)
        default = "required" if required else json.dumps(value, default=_plain)
        yield f"{path}.{name} = {default if name != 'kind' else 'the kind'}"
        for section in sections_in(field.annotation):
            if section not in inside:
                yield from _keys(f"{path}.{name}", section, (*inside, section))


def _plain(part: Any) -> Any:
    return part.model_dump(mode="json") if isinstance(part, BaseModel) else str(part)


def test_no_key_and_no_default_has_changed() -> None:
    assert keys() == FROZEN.read_text().splitlines()


if __name__ == "__main__":
    FROZEN.write_text("\n".join(keys()) + "\n")
