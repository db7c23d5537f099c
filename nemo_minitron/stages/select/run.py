"""Select the channels, heads and layers to keep."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.stages.artifacts import Model, Scores, SearchResult
from nemo_minitron.stages.common.scores import choose_plan
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.select.params import SelectStage


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    scores: Scores | None = None
    search: SearchResult | None = None


def select(params: SelectStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write prune_plan.json from scores and target sizes. This is deterministic and takes seconds on a CPU."""
    from nemo_minitron.pruning.plan_file import write_plan
    from nemo_minitron.pruning.possible import selection_for

    source = inputs.model.shape
    if inputs.search is not None:
        rules = selection_for(params, inputs.search.winner(), source)
        params = params.model_copy(update={"target": rules.target, "head_merge": rules.head_merge})
    plan = choose_plan(params, inputs.model, inputs.scores, f"stages.{ctx.name}")
    document = write_plan(plan, source, ctx.out_dir)
    kept, total = document["num_params"]["target"], document["num_params"]["source"]
    ctx.progress.say(f"keeps {kept:,} of {total:,} parameters ({kept / total:.1%})")
    return {"num_params": kept, "share": kept / total, "target": document["target"], "method": params.method}
