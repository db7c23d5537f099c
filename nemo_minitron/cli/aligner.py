"""`minitron env` and `minitron convert`: NeMo-Aligner's environment, and checkpoints across its border."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.system.terminal import Screen

console = Screen()
env_app = typer.Typer(no_args_is_help=True, help="Environments beside this one.")


@env_app.command("aligner")
def make_aligner(
    torch_index_url: Annotated[
        str | None, typer.Option(envvar="TORCH_INDEX_URL", help="Where pip finds the build of torch for this machine.")
    ] = None,
    find_links: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder of wheels to take all from, with no network; may be repeated."),
    ] = None,
    again: Annotated[bool, typer.Option(help="Remove the old environment first.")] = False,
) -> None:
    """Make the environment of NeMo-Aligner and test it: about 3 minutes and 2.3 GB. Nothing to do in a container."""
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
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.say(f"{folder}\n{told}", "ready", "green")


@env_app.command("has-aligner")
def has_aligner() -> None:
    """Exit with 0 where NeMo-Aligner can be run, with 1 where it cannot."""
    from nemo_minitron.backends.alignment.nemo_aligner.environment import aligner_python
    from nemo_minitron.errors import EnvironmentProblem

    try:
        aligner_python()
    except EnvironmentProblem:
        raise typer.Exit(1) from None


def convert(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder, or a NeMo checkpoint (folder or .nemo).")],
    out: Annotated[Path, typer.Argument(help="A new folder; a name that ends in .nemo gives one packed file.")],
    like: Annotated[
        Path | None, typer.Option(help="From NeMo: the Hugging Face folder with the config and tokenizer to write.")
    ] = None,
) -> None:
    """Convert a model between Hugging Face and NeMo, bit for bit; pruned shapes and Llama 3.1 included."""
    from nemo_minitron.backends.alignment.nemo_aligner import nemo_file
    from nemo_minitron.system.interrupts import StopRequest
    from nemo_minitron.system.progress import Progress

    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".convert-") as work:
        if like is None:
            nemo_file.from_hugging_face(model, out, Path(work), Progress(), StopRequest())
        else:
            nemo_file.to_hugging_face(model, like, out, Path(work), Progress(), StopRequest())
    console.say(out, "written", "green")
