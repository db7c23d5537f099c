"""All that the planner says of a run, as plain facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.plan.resources.costs import estimates, tokenized_bytes, totals
from nemo_minitron.plan.resources.hardware import hardware_of, peak_tflops
from nemo_minitron.plan.resources.layouts import Proposal, proposals
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training import Optimization

PROPOSED = ("tp", "pp", "dp", "micro_batch_size", "sequence_parallel", "distributed_optimizer", "recompute")


def resource_facts(plan: RunPlan) -> dict[str, Any]:
    """Stages with memory, time, cost and disk; their sum; what was assumed; and layouts that fit.

    Layouts are proposed for stages that do not fit, and for all trainings where execution.planning.num_gpus is set.
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
        "proposals": proposed,
        "assumptions": {
            "hardware": hardware.name,
            "peak_tflops": peak_tflops(plan.recipe),
            "mfu": planning.mfu or hardware.usual_mfu,
            "mfu_from": "execution.planning.mfu" if planning.mfu else "usual for it",
            "price_per_gpu_hour": planning.price_per_gpu_hour,
            "reserve_gib": planning.reserve_gib,
        },
    }


def memory_warnings(plan: RunPlan, resources: Mapping[str, Any]) -> Iterator[str]:
    """A line for each stage that would run out of memory, with what would not."""
    for name, facts in resources["stages"].items():
        if facts["fits"]:
            continue
        words = [line["words"] for line in resources["proposals"].get(name, [])]
        processes = plan.call(name).parallel.world_size
        instead = f"fits: {words[0]}" if words else f"nothing fits on {processes}: more GPUs, or larger ones"
        peak, limit = facts["memory"]["peak_gib"], facts["limit_gib"]
        yield f"{name}: {peak:.1f} GiB of a process, {limit:.1f} can be used; {instead}"


def _proposal_facts(proposal: Proposal) -> dict[str, Any]:
    return {
        "layout": proposal.layout.model_dump(),
        "peak_gib": proposal.peak_gib,
        "words": f"{_words(proposal.layout)} ({proposal.peak_gib:.1f} GiB)",
    }


def _words(layout: Parallel) -> str:
    """Every key that a proposal decides, whatever its default: an override is laid over what the recipe has."""
    keys = layout.model_dump(include=set(PROPOSED))
    return "{" + ", ".join(f"{key}: {str(keys[key]).lower()}" for key in PROPOSED) + "}"
