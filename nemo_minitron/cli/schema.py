"""`minitron schema`: the keys that a recipe can have."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nemo_minitron.system.terminal import write


def schema(
    page: Annotated[bool, typer.Option("--page", help="Print a page of Markdown for people instead.")] = False,
) -> None:
    """Print the JSON schema of recipes, with which an editor completes keys, shows their meaning and checks values.

    Example: `minitron schema > recipe.schema.json`, and `# yaml-language-server: $schema=recipe.schema.json` as the
    first line of a recipe.
    """
    from nemo_minitron.config import reference

    if page:
        write(reference.page(), end="")
    else:
        write(json.dumps(reference.json_schema(), indent=1, ensure_ascii=False))
