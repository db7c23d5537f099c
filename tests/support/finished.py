"""Stages of a plan that count as finished, without running them."""

from __future__ import annotations

from collections.abc import Collection

from nemo_minitron.artifacts.manifest import Manifest
from nemo_minitron.artifacts.store import Store
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan


def finish(plan: RunPlan, leave_out: Collection[str] = ()) -> None:
    """Publish every stage of the plan that has not finished, with an empty output."""
    store = Store(run_dir(plan.recipe))
    for call in plan.calls:
        if plan.states[call.name].status != "finished" and call.name not in leave_out:
            with store.building(call.name) as out:
                facts = (plan.recipe.name, call.name, call.kind, call.fingerprint, call.payload, call.inputs, {})
                store.publish(call.name, out, Manifest(*facts))
