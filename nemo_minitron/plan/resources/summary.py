"""All estimates for a run as JSON-compatible dicts, and warnings about memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.plan.planner import RunPlan, StageCall
from nemo_minitron.plan.resources.costs import Estimate, estimates, load_of, tokenized_bytes, totals
from nemo_minitron.plan.resources.hardware import hardware_of, peak_tflops
from nemo_minitron.plan.resources.layouts import Proposal, proposals
from nemo_minitron.plan.view import View
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Optimization
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.workload.batch import batch_proposal

PROPOSED = (
    *("tp", "pp", "cp", "dp", "micro_batch_size", "sequence_parallel", "distributed_optimizer"),
    *("overlap_grad_reduce", "overlap_param_gather", "recompute"),
)


def resource_facts(plan: RunPlan) -> dict[str, Any]:
    """Return the memory, time, cost and disk space of each stage, their totals, the assumptions and proposed layouts.

    Layouts are proposed for stages that do not fit, and for all trainings if execution.planning.num_gpus is set.
    """
    found = estimates(plan)
    hardware, planning = hardware_of(plan.recipe), plan.recipe.execution.planning
    return {
        "stages": {name: estimate.facts() for name, estimate in found.items()},
        "totals": totals(plan, found, tokenized_bytes(plan)),
        "not_estimated": [call.name for call in plan.calls if STAGES[call.kind].uses_gpu and call.name not in found],
        "with_uncounted_tasks": [name for name in found if _runs_tasks(plan, name)],
        "proposals": _proposed(plan, found),
        "batches": _batches(plan),
        "assumptions": {
            "hardware": hardware.name,
            "peak_tflops": peak_tflops(plan.recipe),
            "fp32_tflops": peak_tflops(plan.recipe, "fp32"),
            "mfu": planning.mfu or hardware.usual_mfu,
            "mfu_from": "execution.planning.mfu" if planning.mfu else "usual for it",
            "price_per_gpu_hour": planning.price_per_gpu_hour,
            "reserve_gib": planning.reserve_gib,
        },
    }


def _proposed(plan: RunPlan, found: Mapping[str, Estimate]) -> dict[str, list[dict[str, Any]]]:
    view, execution = View(plan.recipe).for_estimates(), plan.recipe.execution
    wanted, cluster = execution.planning.num_gpus is not None, execution.cluster
    per_node = max(1, cluster.gpus_per_node if cluster else 8)
    out: dict[str, list[dict[str, Any]]] = {}
    for call in plan.calls:
        estimate, is_training = found.get(call.name), isinstance(plan.recipe.stages[call.name], Optimization)
        if estimate is not None and (not estimate.fits or (wanted and is_training)):
            out[call.name] = [
                _proposal_facts(one) for one in proposals(call, view, _num_gpus(call, plan.recipe), per_node)
            ]
    return out


def _num_gpus(call: StageCall, recipe: Recipe) -> int:
    return recipe.execution.planning.num_gpus or call.parallel.world_size


def _runs_tasks(plan: RunPlan, name: str) -> bool:
    """Return whether a stage runs tasks of lm-eval, whose questions are not in its tokens and hours."""
    stage = plan.recipe.stages[name]
    return any(task.runs for task in STAGES[stage.kind].tasks(stage))


def _batches(plan: RunPlan) -> dict[str, dict[str, Any]]:
    """Return the batch of each training, that of the rule for its number of tokens, and the keys that follow."""
    found: dict[str, dict[str, Any]] = {}
    for call in plan.calls:
        stage = plan.recipe.stages[call.name]
        num_steps = getattr(stage, "num_steps", None)
        if isinstance(stage, Optimization) and num_steps is not None:
            layout = call.parallel
            proposal = batch_proposal(stage, num_steps, layout.dp * layout.micro_batch_size)
            found[call.name] = {**asdict(proposal), "is_too_large": proposal.is_too_large}
    return found


def memory_warnings(plan: RunPlan, resources: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each stage that would run out of memory, on GPUs with a layout that fits or what else helps."""
    view, on_cpus = View(plan.recipe).for_estimates(), resources["assumptions"]["hardware"] == "CPU"
    for name, facts in resources["stages"].items():
        if facts["fits"]:
            continue
        call, peak, limit = plan.call(name), facts["memory"]["peak_gib"], facts["limit_gib"]
        if on_cpus:
            processes = call.parallel.world_size
            yield (
                f"{name}: needs {processes * peak:.1f} GiB (all processes), and this machine has "
                f"{processes * limit:.1f} GiB; reduce dp or micro_batch_size, or set recompute: full"
            )
            continue
        words = [line["words"] for line in resources["proposals"].get(name, [])]
        advice = f"fits: {words[0]}" if words else _without_layout(call, view)
        yield f"{name}: a process needs {peak:.1f} GiB and can use {limit:.1f} GiB; {advice}"


def _without_layout(call: StageCall, view: View) -> str:
    """Say what to do if no layout fits."""
    load = load_of(call, view)
    if load is not None and load.work.one_layer is not None:
        return "it holds one layer at a time in every layout; use larger GPUs"
    if load is not None and load.work.then_whole:
        return "tasks and prompts need the whole model on each process in every layout; use larger GPUs, or remove them"
    return f"no layout fits on {_num_gpus(call, view.recipe)} GPUs; use more or larger ones"


def _proposal_facts(proposal: Proposal) -> dict[str, Any]:
    return {
        "layout": proposal.layout.model_dump(),
        "peak_gib": proposal.peak_gib,
        "mfu": proposal.mfu,
        "words": f"{_words(proposal.layout)} ({proposal.peak_gib:.1f} GiB)",
    }


def _words(layout: Parallel) -> str:
    """Write all keys of the proposal, defaults included, because an override is merged into the recipe's layout."""
    keys = layout.model_dump(include=set(PROPOSED))
    return "{" + ", ".join(f"{key}: {str(keys[key]).lower()}" for key in PROPOSED) + "}"
