"""A recipe: its name, its stages, and where and how they run."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from nemo_minitron.schema.base import Schema, StageName, StageParams
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.registry import STAGES

if TYPE_CHECKING:
    StageConfig = StageParams
else:
    # The union of all registered kinds, so that the kinds of other packages are validated in the same way.
    StageConfig = Annotated[reduce(or_, (kind.params for kind in STAGES.values())), Field(discriminator="kind")]


class Recipe(Schema):
    """One complete, named run."""

    name: Annotated[str, Field(pattern=r"^[^\W_][\w.-]*(/[^\W_][\w.-]*)*$")]
    """Folder of the run below run_root. By default, the path of the recipe file below recipes/."""
    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]
    """The stages by name. A stage whose name is its kind needs no `kind`."""
    execution: Execution = Execution()
    """Where and how the stages run. It never changes a result."""
