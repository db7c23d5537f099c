"""Decide what to keep."""

from __future__ import annotations

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import SelectStage
from nemo_minitron.stages.spec import Result, StageContext


def select(params: SelectStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Turn scores and target sizes into prune_plan.json. Seconds on a CPU, deterministic."""
    from safetensors.torch import load_file

    from nemo_minitron.families import read_shape
    from nemo_minitron.hf.checkpoint import read_config
    from nemo_minitron.pruning.plan_file import write_plan
    from nemo_minitron.pruning.selection import choose_keep

    source = read_shape(read_config(inputs["model"].path))
    scores = inputs.get("scores")
    loaded = load_file(str(scores.path / "scores.safetensors")) if scores else {}
    document = write_plan(choose_keep(loaded, source, params), source, ctx.out_dir)
    kept, total = document["num_params"]["target"], document["num_params"]["source"]
    ctx.progress.say(f"keeps {kept:,} of {total:,} parameters ({kept / total:.1%})")
    return {"num_params": kept, "share": kept / total, "target": document["target"], "method": params.method}
