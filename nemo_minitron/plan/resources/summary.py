"""All estimates for a run as JSON-compatible dicts, and warnings about memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.plan.resources.costs import estimates, tokenized_bytes, totals
from nemo_minitron.plan.resources.hardware import hardware_of, peak_tflops
from nemo_minitron.plan.resources.layouts import Proposal, proposals
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Optimization
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.workload.batch import batch_proposal

PROPOSED = (
    *("tp", "pp", "dp", "micro_batch_size", "sequence_parallel", "distributed_optimizer"),
    *("overlap_grad_reduce", "overlap_param_gather", "recompute"),
)


def resource_facts(plan: RunPlan) -> dict[str, Any]:
    """Return the memory, time, cost and disk space of each stage, their totals, the assumptions and proposed layouts.

    Layouts are proposed for stages that do not fit, and for all trainings if execution.planning.num_gpus is set.
    """
    found = estimates(plan)
    execution = plan.recipe.execution
    wanted = execution.planning.num_gpus
    per_node = execution.cluster.gpus_per_node if execution.cluster else 8
    proposed: dict[str, list[dict[str, Any]]] = {}
    for call in plan.calls:
        is_training = isinstance(plan.recipe.stages[call.name], Optimization)
        if call.name in found and is_training and (wanted is not None or not found[call.name].fits):
            best = proposals(call, plan.recipe, wanted or call.parallel.world_size, max(1, per_node))
            proposed[call.name] = [_proposal_facts(one) for one in best]
    hardware, planning = hardware_of(plan.recipe), execution.planning
    return {
        "stages": {name: estimate.facts() for name, estimate in found.items()},
        "totals": totals(found, tokenized_bytes(plan)),
        "with_uncounted_tasks": [name for name in found if _runs_tasks(plan, name)],
        "proposals": proposed,
        "batches": _batches(plan),
        "assumptions": {
            "hardware": hardware.name,
            "peak_tflops": peak_tflops(plan.recipe),
            "mfu": planning.mfu or hardware.usual_mfu,
            "mfu_from": "execution.planning.mfu" if planning.mfu else "usual for it",
            "price_per_gpu_hour": planning.price_per_gpu_hour,
            "reserve_gib": planning.reserve_gib,
        },
    }


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
    """Yield a line for each stage that would run out of memory, on GPUs with a layout that fits."""
    on_cpus = resources["assumptions"]["hardware"] == "CPU"
    for name, facts in resources["stages"].items():
        if facts["fits"]:
            continue
        words = [line["words"] for line in resources["proposals"].get(name, [])]
        processes = plan.call(name).parallel.world_size
        peak, limit = facts["memory"]["peak_gib"], facts["limit_gib"]
        if on_cpus:
            yield (
                f"{name}: needs {processes * peak:.1f} GiB (all processes), and this machine has "
                f"{processes * limit:.1f} GiB; reduce dp or micro_batch_size, or set recompute: full"
            )
            continue
        advice = f"fits: {words[0]}" if words else f"no layout fits on {processes} GPUs; use more or larger ones"
        yield f"{name}: a process needs {peak:.1f} GiB and can use {limit:.1f} GiB; {advice}"


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
