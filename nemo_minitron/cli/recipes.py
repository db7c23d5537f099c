"""`minitron recipes`: the recipes of the package."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from nemo_minitron.cli.output import console
from nemo_minitron.system.terminal import write


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Print this one: minitron recipes template > mine.yaml"),
    ] = None,
) -> None:
    """List the recipes that come with the package, each with its first line; or print one of them."""
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
