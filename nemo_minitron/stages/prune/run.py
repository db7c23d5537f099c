"""Cut the model by plan."""

from __future__ import annotations

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.prune.params import PruneStage


def prune(params: PruneStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Hugging Face checkpoint and prune_plan.json in, smaller Hugging Face checkpoint out."""
    from nemo_minitron.families import read_shape
    from nemo_minitron.hf.checkpoint import model_facts, read_config
    from nemo_minitron.pruning.plan_file import read_plan
    from nemo_minitron.pruning.slicing import prune_checkpoint

    model = inputs["model"]
    plan = read_plan(inputs["plan"].path, read_shape(read_config(model.path)))
    prune_checkpoint(model.path, plan, ctx.out_dir, ctx.progress)
    return {**model_facts(ctx.out_dir), "license": model.result.get("license")}
