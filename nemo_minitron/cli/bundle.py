"""`minitron bundle`: recipes and all that they need in one file, for machines without a network."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nemo_minitron.cli.plan import print_warnings
from nemo_minitron.errors import ConfigError
from nemo_minitron.system.terminal import Screen

if TYPE_CHECKING:
    from nemo_minitron.bundle.items import Item
    from nemo_minitron.system.progress import Progress

console = Screen()


def bundle(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes; overrides go into each of them.")
    ],
    out: Annotated[Path, typer.Option(metavar="NAME.tar", help="The file to write.")],
    wheels: Annotated[
        bool, typer.Option(help="Take along the package and all that it needs, for this platform.")
    ] = True,
    aligner: Annotated[bool, typer.Option(help="Wheels of NeMo-Aligner's environment, too.")] = False,
    torch_index_url: Annotated[
        str | None, typer.Option(envvar="TORCH_INDEX_URL", help="Where pip finds the build of torch for the machine.")
    ] = None,
) -> None:
    """Put recipes, models, data and wheels into one file that installs and runs without a network.

    There: `tar xf NAME.tar && NAME/install.sh`.
    """
    from nemo_minitron.bundle import archive
    from nemo_minitron.bundle.collect import collect
    from nemo_minitron.system.progress import Progress

    recipes, overrides = _split(words)
    if aligner and not wheels:
        raise ConfigError("--aligner asks for wheels, --no-wheels for none.", where="minitron bundle")
    archive.require_new(out)
    progress = Progress()
    found = collect(recipes, overrides, progress)
    with ExitStack() as stack:
        script = Path(archive.__file__).with_name(archive.INSTALL_FILE)
        items = [*found.items, _script(script)]
        facts, warnings = _facts(found.recipes), found.warnings
        if wheels:
            more, facts["wheels"], told = _wheels(torch_index_url, stack, progress, aligner=aligner)
            items, warnings = [*items, *more], [*warnings, *told]
        written = archive.write_archive(out, items, facts, progress)
    if wheels and found.needs_aligner and not aligner:
        warnings.append("The recipes need NeMo-Aligner: add --aligner, unless the other machine has it in a container.")
    print_warnings(warnings)
    _print(out, written)


def _split(words: list[str]) -> tuple[list[Path], list[str]]:
    """(recipes, overrides)."""
    overrides = [word for word in words if ("=" in word or word[:1] in "~+") and not Path(word).is_file()]
    recipes = [Path(word) for word in words if word not in overrides]
    if not recipes:
        raise ConfigError("No recipe is named.", where="minitron bundle", next_step="E.g. recipes/toy/width.yaml")
    return recipes, overrides


def _script(file: Path) -> Item:
    from nemo_minitron.bundle.items import Item

    return Item(file.name, file.read_bytes(), "script")


def _facts(recipes: list[dict[str, Any]]) -> dict[str, Any]:
    from nemo_minitron import __version__
    from nemo_minitron.bundle.wheels import target

    return {"nemo_minitron": __version__, "target": target(), "recipes": recipes}


def _wheels(
    torch_index_url: str | None, stack: ExitStack, progress: Progress, *, aligner: bool
) -> tuple[list[Item], dict[str, Any], list[str]]:
    """(files, versions by environment, warnings)."""
    from nemo_minitron.bundle import wheels
    from nemo_minitron.bundle.items import Item

    core = [*wheels.core_wheels(torch_index_url, progress), stack.enter_context(wheels.own_wheel())]
    files, told = {"core": core}, list(wheels.warnings_about(core))
    lists = {"core": wheels.list_of(core)}
    if aligner:
        found = wheels.aligner_wheels(progress)
        lists["aligner"] = wheels.list_of([*found, *wheels.torch_only_wheels(core)])
        # The same file is needed once: the environment looks into both folders.
        shared = {file.name for file in core}
        files["aligner"] = [file for file in found if file.name not in shared]
    items = [Item(f"wheels/{name}/{file.name}", file, "wheel") for name, found in files.items() for file in found]
    items += [Item(f"wheels/{name}/{wheels.LIST_FILE}", text, "list") for name, text in lists.items()]
    return items, {name: wheels.versions_of(found) for name, found in files.items()}, told


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
