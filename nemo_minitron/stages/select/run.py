"""Decide what to keep."""

from __future__ import annotations

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.stages.common.scores import load_scores
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.select.params import SelectStage


def select(params: SelectStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Turn scores and target sizes into prune_plan.json. Seconds on a CPU, deterministic."""
    from nemo_minitron.families import read_shape
    from nemo_minitron.hf.checkpoint import read_config
    from nemo_minitron.pruning.plan_file import write_plan
    from nemo_minitron.pruning.search import winner_of
    from nemo_minitron.pruning.selection import choose_keep

    source = read_shape(read_config(inputs["model"].path))
    search = inputs.get("search")
    if search is not None:
        params = params.model_copy(update={"target": winner_of(search.path)})
    document = write_plan(choose_keep(load_scores(params, inputs), source, params), source, ctx.out_dir)
    kept, total = document["num_params"]["target"], document["num_params"]["source"]
    ctx.progress.say(f"keeps {kept:,} of {total:,} parameters ({kept / total:.1%})")
    return {"num_params": kept, "share": kept / total, "target": document["target"], "method": params.method}
