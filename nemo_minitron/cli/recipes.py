"""`minitron recipes` and `minitron schema`: the recipes of the package, and the keys that a recipe can have."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from nemo_minitron.system.terminal import Screen, write

console = Screen()


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this one: minitron recipes template > mine.yaml")
    ] = None,
) -> None:
    """List the recipes that come with the package, each with the first line of its text; or print one."""
    from nemo_minitron.system.places import RECIPES, require_shipped_recipe, shipped_dir, shipped_recipes

    if name is not None:
        write(require_shipped_recipe(name).read_text(encoding="utf-8"), end="")
        return
    table = Table()
    for column in ("recipe", "what"):
        table.add_column(column, no_wrap=column == "recipe")
    for found in shipped_recipes():
        text = (shipped_dir(RECIPES) / f"{found}.yaml").read_text(encoding="utf-8")
        first = text.partition("\n")[0]
        table.add_row(found, first.removeprefix("#").strip() if first.startswith("#") else "")
    console.print(table)


def schema(
    page: Annotated[bool, typer.Option("--page", help="As a page of Markdown for people.")] = False,
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
