"""`minitron bundle`: recipes and all that they need in one file, for machines without a network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nemo_minitron.cli.arguments import expanded
from nemo_minitron.cli.output import console, print_warnings
from nemo_minitron.errors import ConfigError


def bundle(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes; overrides apply to each of them.")
    ],
    out: Annotated[Path, typer.Option(callback=expanded, metavar="NAME.tar", help="The file to write.")],
    wheels: Annotated[bool, typer.Option(help="Include the package and its dependencies for this platform.")] = True,
    aligner: Annotated[bool, typer.Option(help="Include the wheels of NeMo-Aligner's environment.")] = False,
    torch_index_url: Annotated[
        str | None, typer.Option(envvar="TORCH_INDEX_URL", help="Index with the build of torch for the other machine.")
    ] = None,
) -> None:
    """Put recipes, models, data and wheels into one file that installs and runs without a network.

    There: `tar xf NAME.tar && NAME/install.sh`.
    """
    from nemo_minitron.bundle.pack import pack
    from nemo_minitron.system.progress import Progress

    recipes, overrides = _split(words)
    if aligner and not wheels:
        raise ConfigError("--aligner requests wheels, and --no-wheels excludes them.", where="minitron bundle")
    written, warnings = pack(
        recipes,
        overrides,
        out,
        Progress(),
        with_wheels=wheels,
        with_aligner=aligner,
        torch_index_url=torch_index_url,
    )
    print_warnings(warnings)
    _print(out, written)


def _split(words: list[str]) -> tuple[list[Path], list[str]]:
    """Split the arguments into (recipes, overrides)."""
    overrides = [word for word in words if ("=" in word or word[:1] in "~+") and not Path(word).is_file()]
    recipes = [Path(word) for word in words if word not in overrides]
    if not recipes:
        raise ConfigError("No recipe is named.", where="minitron bundle", next_step="E.g. recipes/toy/width.yaml")
    return recipes, overrides


def _print(out: Path, written: dict[str, Any]) -> None:
    table = Table()
    for column in ("what", "files", "MB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what in dict.fromkeys(file["what"] for file in written["files"]):
        sizes = [file["size_bytes"] for file in written["files"] if file["what"] == what]
        table.add_row(what, str(len(sizes)), f"{sum(sizes) / 1e6:,.1f}")
    console.print(table)
    console.say(f"{out}, {written['size_bytes'] / 1e6:,.1f} MB", "written", "green")
    for line in (
        f"sha256 {written['sha256']}",
        f"there: tar xf {shlex.quote(out.name)} && {shlex.quote(out.stem)}/install.sh",
    ):
        console.say(line)
