"""`minitron report`: render the report again."""

from __future__ import annotations

from nemo_minitron import api
from nemo_minitron.cli.arguments import Overrides, RecipeFile
from nemo_minitron.cli.output import print_report_path


def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Render the report again from the finished stages, and print its path."""
    print_report_path(api.report(api.load_recipe(recipe, overrides)))
