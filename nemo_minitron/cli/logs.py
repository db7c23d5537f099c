"""`minitron logs`: the last lines of a stage's logs."""

from __future__ import annotations

from typing import Annotated

import typer

from nemo_minitron import api
from nemo_minitron.cli.arguments import Overrides, RecipeFile
from nemo_minitron.cli.output import console
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.disclosure import environment_of, masked_log
from nemo_minitron.system.terminal import write


def logs(
    recipe: RecipeFile,
    name: Annotated[str, typer.Argument(metavar="STAGE", help="The stage.")],
    overrides: Overrides = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 40,
) -> None:
    """Print the last lines of every log of a stage."""
    from nemo_minitron.launch.logs import logs_of, tail
    from nemo_minitron.plan.folder import run_dir

    loaded = api.load_recipe(recipe, overrides)
    run, environment = run_dir(loaded), environment_of(loaded.model_dump(mode="json"))
    found = logs_of(run, name)
    if not found:
        raise EnvironmentProblem(f"Stage {name} has no log yet.", where=str(run / "logs"))
    for file in found:
        console.say("", str(file), "bold")
        for line in masked_log(tail(file, lines), environment):
            write(line)
