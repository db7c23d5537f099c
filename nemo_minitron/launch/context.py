"""Paths and programs that the command lines and scripts of one submission use."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.artifacts.run_paths import LAUNCHES
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import PlanError
from nemo_minitron.execution.runner import write_recipe
from nemo_minitron.launch.record import RECIPE_FILE
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.processes.same_code import START
from nemo_minitron.schema.cluster import Cluster
from nemo_minitron.system.disclosure import environment_script, write_private
from nemo_minitron.system.safe_files import own_folder

PROGRAM = "minitron"
"""Name of the program, on nodes and in containers."""
ENVIRONMENT_FILE = "environment.sh"
"""Shell script in the folder of a submission with `execution.cluster.environment`; readable by its owner only."""


@dataclass(frozen=True)
class JobFolders:
    """Folders that the stages of one run need to see, and the folder where they start."""

    cwd: Path
    run: Path
    assets: Path
    launch: Path
    """Folder of this submission, below the run's folder."""

    @property
    def environment_file(self) -> Path:
        return self.launch / ENVIRONMENT_FILE

    @property
    def mounted(self) -> tuple[Path, ...]:
        """Folders that containers see at the same paths as the host."""
        return (self.run, self.assets, self.cwd)

    @property
    def home(self) -> Path:
        """Home folder inside containers, kept with the run."""
        return self.run / ".home"

    @property
    def hub(self) -> Path:
        """Download cache of the Hugging Face hub for containers."""
        return self.assets / ".huggingface"


@dataclass(frozen=True)
class JobContext:
    """Paths and program of the jobs of one submission."""

    recipe_name: str
    run_dir: Path
    launch_dir: Path
    """Folder of this submission: the composed recipe, the scripts, and the files that stages leave for them."""
    folders: JobFolders
    program: Sequence[str]
    """Words that start `minitron` on the node, where no container is used."""

    @property
    def recipe_file(self) -> Path:
        return self.launch_dir / RECIPE_FILE


def cluster_of(recipe: Recipe) -> Cluster:
    """Return the site of a recipe.

    Raises:
        PlanError: the recipe names no site.
    """
    if recipe.execution.cluster is None:
        raise PlanError(
            "execution.cluster is not set, and the launcher needs the settings of the site.",
            next_step="Add cluster=NAME (a file of configs/cluster/), or cluster=path/to/site.yaml.",
        )
    return recipe.execution.cluster


def job_context(recipe: Recipe, launch_dir: Path) -> JobContext:
    """Return the absolute paths that the jobs of a submission use."""
    cluster = cluster_of(recipe)
    cwd, run = Path.cwd(), run_dir(recipe).absolute()
    return JobContext(
        recipe_name=recipe.name,
        run_dir=run,
        launch_dir=launch_dir.absolute(),
        folders=JobFolders(cwd, run, Path(recipe.execution.assets_dir).absolute(), launch_dir.absolute()),
        program=[cluster.command] if cluster.command else own_program(),
    )


def own_program() -> list[str]:
    """Return the words that start this installation of `minitron` on a node.

    The program that is running now, or the one beside this Python; `pip install --user` puts it elsewhere. Where there
    is neither, as in `python -m nemo_minitron` or a notebook, Python starts the package.
    """
    for program in (Path(sys.argv[0]).absolute(), Path(sys.executable).with_name(PROGRAM)):
        if program.name == PROGRAM and program.is_file() and os.access(program, os.X_OK):
            return [str(program)]
    return [sys.executable, str(START), "minitron"]


def dry_run_context(recipe: Recipe) -> JobContext:
    """Return the context of a submission that only a dry run shows: its folder has no number yet."""
    return job_context(recipe, run_dir(recipe) / LAUNCHES / "NNN")


def make_launch_folder(recipe: Recipe, context: JobContext) -> None:
    """Make the folder of a submission, with the composed recipe and the variables of the site."""
    own_folder(run_dir(recipe), context.launch_dir.parent.name)
    context.launch_dir.mkdir()
    write_recipe(recipe, context.recipe_file)
    write_private(context.folders.environment_file, environment_script(cluster_of(recipe).environment))
