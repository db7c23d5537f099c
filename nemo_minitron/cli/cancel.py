"""`minitron cancel`: end the jobs of a run."""

from __future__ import annotations

from nemo_minitron import api
from nemo_minitron.cli.arguments import Overrides, RecipeFile
from nemo_minitron.cli.output import console


def cancel(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Cancel the jobs of the last submission; what they have saved stays, and `launch` continues from it."""
    from nemo_minitron.launch.status import cancel_jobs
    from nemo_minitron.plan.folder import run_dir

    canceled = cancel_jobs(run_dir(api.load_recipe(recipe, overrides)))
    if canceled is None:
        console.say("nothing was submitted")
    else:
        console.say(f"canceled {', '.join(canceled)}" if canceled else "no job was left")
