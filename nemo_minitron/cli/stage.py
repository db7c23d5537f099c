"""`minitron stage`: run one stage of a composed recipe, as the jobs of `minitron launch` do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_minitron.errors import ConfigError, Interrupted, MinitronError, ProcessesDied

if TYPE_CHECKING:
    from nemo_minitron.config.recipe import Recipe


def stage(
    recipe_json: Annotated[Path, typer.Argument(help="The composed recipe of a submission.")],
    name: Annotated[str, typer.Argument(help="The stage.")],
) -> None:
    """Run one stage of a composed recipe. The jobs of `launch` call this on every node."""
    from nemo_minitron.execution.job import run_in_job, write_for_script

    try:
        run_in_job(_read_composed(recipe_json), name)
    except (Interrupted, KeyboardInterrupt) as error:
        # The job's script finds this file and continues the stage in another job, even if nothing is saved yet.
        write_for_script("MINITRON_INTERRUPTED_FILE", error)
        raise
    except ProcessesDied:
        raise
    except MinitronError as error:
        # The job's script finds this file and does not retry, because only the user can repair the cause.
        write_for_script("MINITRON_FAILED_FILE", error)
        raise


def _read_composed(file: Path) -> Recipe:
    from pydantic import ValidationError

    from nemo_minitron.config.recipe import Recipe

    try:
        return Recipe.model_validate(json.loads(file.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"There is no {file}.", next_step="Submit again with `minitron launch`.") from None
    except (ValidationError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"This is no composed recipe of this version: {str(error).splitlines()[0]}",
            where=str(file),
            next_step="Submit again with `minitron launch`.",
        ) from None
