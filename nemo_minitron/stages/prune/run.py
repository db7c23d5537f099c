"""Prune a model according to a prune plan."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.stages.artifacts import Model, PrunePlanArtifact
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.prune.params import PruneStage


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    plan: PrunePlanArtifact


def prune(params: PruneStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write the pruned model as a Hugging Face checkpoint."""
    from nemo_minitron.hf.checkpoint import model_facts
    from nemo_minitron.pruning.slicing import prune_checkpoint

    model = inputs.model
    plan = inputs.plan.load(model.shape)
    prune_checkpoint(model.path, plan, ctx.out_dir, ctx.progress)
    return {**model_facts(ctx.out_dir), "license": model.license}
