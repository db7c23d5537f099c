"""The recipe around a stage, as the hooks of stage kinds see it: shapes, rows, layouts and published files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.families import ModelShape
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.chats import ChatRowFacts
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import Target
from nemo_minitron.stages.registry import STAGES


@dataclass(frozen=True)
class View:
    """Implementation of `nemo_minitron.stages.kind.RecipeView` for a recipe."""

    recipe: Recipe
    seen: frozenset[str] = frozenset()
    """Stages whose shape is being computed; they end the recursion in a cycle of stages."""
    largest: Mapping[str, Target] = field(default_factory=dict)
    """Search -> sizes of its largest candidate, in a view for estimates."""

    @property
    def stages(self) -> Mapping[str, StageParams]:
        return self.recipe.stages

    @property
    def assets_dir(self) -> Path:
        return Path(self.recipe.execution.assets_dir)

    def shape(self, stage: str) -> ModelShape | None:
        params = self.stages.get(stage)
        if params is None or stage in self.seen:
            return None
        return STAGES[params.kind].shape(stage, params, replace(self, seen=self.seen | {stage}))

    def planned_shape(self, stage: str) -> ModelShape | None:
        params = self.stages.get(stage)
        return None if params is None else STAGES[params.kind].planned_shape(stage, params, self)

    def for_estimates(self) -> View:
        """Return a view in which what a search decides has the sizes of its candidate with the most parameters."""
        largest: dict[str, Target] = {}
        for name, stage in self.stages.items():
            points = list(STAGES[stage.kind].points(name, stage, self))
            if points:
                most = max(points, key=lambda point: point["num_params"])
                largest[name] = Target(**{key: most[key] for key in Target.model_fields})
        return replace(self, largest=largest)

    def with_layout(self, stage: str, layout: Parallel) -> View:
        """Return the view of the recipe in which a stage has this layout."""
        execution = self.recipe.execution
        by_stage = {**execution.parallel_by_stage, stage: layout}
        changed = execution.model_copy(update={"parallel_by_stage": by_stage})
        return replace(self, recipe=self.recipe.model_copy(update={"execution": changed}))

    def largest_candidate(self, search: str) -> Target | None:
        return self.largest.get(search)

    def plan_of(self, stage: str) -> str | None:
        seen: set[str] = set()
        while stage in self.stages and stage not in seen:
            seen.add(stage)
            params = self.stages[stage]
            plan = STAGES[params.kind].cuts_by(params)
            if plan is not None:
                return plan
            stage = next(
                (getattr(params.inputs, role) for role in ("model", "student") if hasattr(params.inputs, role)), ""
            )
        return None

    def chat_rows(self, stage: str) -> ChatRowFacts | None:
        params = self.stages.get(stage)
        return None if params is None else STAGES[params.kind].chat_rows(stage, params, self)

    def layout(self, stage: str) -> Parallel:
        """Return the stage's own layout, else that of its whole, else the run's; one process if it has no layout."""
        execution = self.recipe.execution
        kind = STAGES[self.stages[stage].kind]
        if not kind.has_layout:
            return Parallel()
        own = execution.parallel_by_stage
        layout = own.get(stage) or own.get(self.whole(stage)) or execution.parallel
        if kind.whole_layers:
            return Parallel(dp=layout.world_size, micro_batch_size=layout.micro_batch_size)
        return layout

    def whole(self, stage: str) -> str:
        """Return the stage that a stage is a part of, such as the search of a candidate; else the stage itself."""
        params = self.stages[stage]
        return STAGES[params.kind].part_of(stage, params) or stage

    def published(self, stage: str, file: str) -> Path | None:
        return Store(run_dir(self.recipe)).intact(stage, file)
