"""`minitron env`: Python environments of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.arguments import expanded
from nemo_minitron.cli.output import console

env_app = typer.Typer(no_args_is_help=True, help="Python environments beside this one.")


@env_app.command("aligner")
def make_aligner(
    torch_index_url: Annotated[
        str | None, typer.Option(envvar="TORCH_INDEX_URL", help="Index with the build of torch for this machine.")
    ] = None,
    find_links: Annotated[
        list[Path] | None,
        typer.Option(
            callback=expanded,
            metavar="DIR",
            help="Folder of wheels to install from without a network; may be repeated.",
        ),
    ] = None,
    again: Annotated[bool, typer.Option(help="Remove the old environment first.")] = False,
) -> None:
    """Make the environment of NeMo-Aligner and test it: about 3 minutes and 2.3 GB. Containers do not need it."""
    from nemo_minitron.backends.alignment.nemo_aligner import environment
    from nemo_minitron.system.progress import Progress

    if environment.is_installed_here():
        versions = environment.versions_installed()
        console.say("NeMo-Aligner is installed beside this package", "ready", "green")
        console.say(", ".join(f"{name} {version}" for name, version in versions.items()))
        return
    folder = environment.make_environment(
        Progress(), torch_index_url=torch_index_url, find_links=find_links or (), again=again
    )
    versions = json.loads((folder / environment.READY_FILE).read_text())
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.say(f"{folder}\n{listed}", "ready", "green")


@env_app.command("has-aligner")
def has_aligner() -> None:
    """Exit with code 0 if NeMo-Aligner can run here, else with 1."""
    from nemo_minitron.backends.alignment.nemo_aligner.environment import aligner_python
    from nemo_minitron.errors import EnvironmentProblem

    try:
        aligner_python()
    except EnvironmentProblem:
        raise typer.Exit(1) from None
