"""The planner: it turns a recipe into stage calls in order, with their fingerprints and states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import PlanError
from nemo_minitron.plan.fingerprint import differences, fingerprint, params_of
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.functions import function_facts
from nemo_minitron.plan.sources import source_facts
from nemo_minitron.plan.view import View
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.registry import STAGES

InputNames = Mapping[str, Any]
"""Input role -> stage name, or a list or dict of stage names."""


@dataclass(frozen=True)
class StageCall:
    """A stage with everything that determines its output."""

    name: str
    kind: str
    inputs: InputNames
    params: Mapping[str, Any]
    parallel: Parallel
    payload: Mapping[str, Any]
    """The content that the fingerprint is computed from."""
    fingerprint: str

    @property
    def depends(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_names(self.inputs)))


@dataclass(frozen=True)
class State:
    """Whether a stage has to run, and why."""

    status: str
    """finished, changed, or to run."""
    reason: str


@dataclass(frozen=True)
class RunPlan:
    """A recipe with its stage calls in order of execution, and the state of each stage."""

    recipe: Recipe
    calls: tuple[StageCall, ...]
    states: Mapping[str, State]

    def call(self, name: str) -> StageCall:
        return next(call for call in self.calls if call.name == name)

    def followers(self, names: set[str]) -> set[str]:
        """Return these stages and all stages that depend on them."""
        out = set(names)
        for call in self.calls:
            if out & set(call.depends):
                out.add(call.name)
        return out

    def needed_for(self, stage: str | None) -> set[str]:
        """Return the stage and all stages that it depends on; for None, every stage."""
        out = {call.name for call in self.calls} if stage is None else {stage}
        for call in reversed(self.calls):
            if call.name in out:
                out.update(call.depends)
        return out


def make_plan(recipe: Recipe, sources: Mapping[str, Mapping[str, Any]] | None = None) -> RunPlan:
    """Order the stages, compute their fingerprints, and compare these with the manifests on disk. Write nothing.

    The recipe of the plan is the given one with its searches expanded into stages.

    Args:
        sources: stage -> facts about its sources, if they are already known; otherwise the files are listed.

    Raises:
        PlanError: an input is not a stage or is of the wrong kind, stages form a cycle, or a search has no candidates.
    """
    recipe = expanded(recipe)
    inputs = {name: _inputs_of(name, View(recipe)) for name in recipe.stages}
    order = _order(inputs, recipe)
    store = Store(run_dir(recipe))
    accepted = store.accepted_drift()
    effective: dict[str, str] = {}
    calls = []
    for name in order:
        call = _call(name, recipe, inputs[name], effective, store, (sources or {}).get(name))
        effective[name] = _effective(call, store, accepted)
        calls.append(call)
    return RunPlan(recipe, tuple(calls), _states(calls, store, effective))


def refreshed(plan: RunPlan) -> RunPlan:
    """Return the plan with the current states on disk, without listing the files outside the run again."""
    return make_plan(plan.recipe, {call.name: call.payload["sources"] for call in plan.calls})


def expanded(recipe: Recipe) -> Recipe:
    """Return the recipe with its searches expanded into stages; expanding it again changes nothing.

    A search over a model of unknown sizes is not expanded and cannot run.

    Raises:
        PlanError: no point of a grid meets the constraints, or too many points do.
    """
    view, stages = View(recipe), dict[str, StageParams]()
    for name, stage in recipe.stages.items():
        written = STAGES[stage.kind].expand(name, stage, view)
        stages.update({name: stage} if written is None else written)
    return recipe.model_copy(update={"stages": stages})


def _call(
    name: str,
    recipe: Recipe,
    inputs: InputNames,
    done: Mapping[str, str],
    store: Store,
    sources: Mapping[str, Any] | None,
) -> StageCall:
    stage = recipe.stages[name]
    params, manifest = params_of(stage), store.manifest(name)
    if sources is None:
        sources = source_facts(stage, recipe, manifest.payload.get("sources", {}) if manifest else {})
    payload = {
        "kind": stage.kind,
        "version": STAGES[stage.kind].version,
        "params": params,
        "inputs": _replace_names(inputs, done),
        "sources": sources,
    }
    functions = function_facts(stage, manifest)
    if functions:
        payload["functions"] = functions
    return StageCall(
        name=name,
        kind=stage.kind,
        inputs=inputs,
        params=params,
        parallel=View(recipe).layout(name),
        payload=payload,
        fingerprint=fingerprint(payload),
    )


def _effective(call: StageCall, store: Store, accepted: Mapping[str, str]) -> str:
    """Return the fingerprint on disk if the user has accepted it in place of the planned one, else the planned one."""
    manifest = store.manifest(call.name)
    if manifest is not None and accepted.get(call.fingerprint) == manifest.fingerprint:
        return manifest.fingerprint
    return call.fingerprint


def _states(calls: list[StageCall], store: Store, effective: Mapping[str, str]) -> dict[str, State]:
    states: dict[str, State] = {}
    for call in calls:
        manifest = store.manifest(call.name)
        unfinished = [name for name in call.depends if states[name].status != "finished"]
        if manifest is None:
            states[call.name] = State("to run", f"waits for {_shortened(unfinished)}" if unfinished else "not run yet")
        elif manifest.fingerprint == effective[call.name]:
            states[call.name] = _finished(call, effective, unfinished)
        else:
            states[call.name] = State("changed", _why_changed(manifest.payload, call, states))
    return states


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _finished(call: StageCall, effective: Mapping[str, str], unfinished: list[str]) -> State:
    if unfinished:
        return State("finished", f"same fingerprint; {', '.join(unfinished)} will run again with the same keys")
    if effective[call.name] != call.fingerprint:
        return State("finished", "drift accepted: the recipe has changed since then")
    return State("finished", "same fingerprint")


def _why_changed(old: Mapping[str, Any], call: StageCall, states: Mapping[str, State]) -> str:
    own = differences({**old, "inputs": None}, {**call.payload, "inputs": None})
    if own:
        return "; ".join(diff.removeprefix("params.") for diff in own)
    causes = [name for name in call.depends if states[name].status != "finished"]
    return f"because {', '.join(causes)} changes" if causes else "it has different inputs than before"


def _inputs_of(name: str, view: View) -> InputNames:
    """Return the input roles that are filled in the recipe and read by the stage."""
    stage = view.stages[name]
    named = {role: value for role, value in stage.inputs.model_dump(mode="json").items() if value is not None}
    used = STAGES[stage.kind].used_inputs(name, stage, named, view)
    return {role: value for role, value in used.items() if value}


def _names(inputs: InputNames) -> Iterator[str]:
    for value in inputs.values():
        if isinstance(value, str):
            yield value
        else:
            yield from (value.values() if isinstance(value, Mapping) else value)


def _replace_names(inputs: InputNames, done: Mapping[str, str]) -> dict[str, Any]:
    """Replace the names of input stages with their fingerprints."""

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return done[value]
        if isinstance(value, Mapping):
            return {label: done[name] for label, name in value.items()}
        return {name: done[name] for name in value}

    return {role: replace(value) for role, value in inputs.items()}


def _order(inputs: Mapping[str, InputNames], recipe: Recipe) -> list[str]:
    problems = [problem for name in inputs for problem in _input_problems(name, inputs[name], recipe)]
    if problems:
        raise PlanError("The stages do not fit together:\n" + "\n".join(f"  - {problem}" for problem in problems))
    graph = {name: set(_names(roles)) for name, roles in inputs.items()}
    try:
        sorter = TopologicalSorter(graph)
        sorter.prepare()
    except CycleError as error:
        raise PlanError(f"Stages form a cycle: {' -> '.join(error.args[1])}.") from None
    # Stages that are ready at the same time keep the order of the recipe.
    listed = list(recipe.stages)
    out: list[str] = []
    while sorter.is_active():
        for name in sorted(sorter.get_ready(), key=listed.index):
            out.append(name)
            sorter.done(name)
    return out


def _input_problems(name: str, roles: InputNames, recipe: Recipe) -> Iterator[str]:
    accepted = STAGES[recipe.stages[name].kind].inputs
    for role, value in roles.items():
        for other in _names({role: value}):
            key = f"stages.{name}.inputs.{role} = {other}"
            if other not in recipe.stages:
                yield f"{key}: there is no such stage. Allowed: {', '.join(recipe.stages)}."
            elif role in accepted and not set(accepted[role]) & set(STAGES[recipe.stages[other].kind].outputs):
                kinds = ", ".join(kind.name for kind in STAGES.values() if set(accepted[role]) & set(kind.outputs))
                yield f"{key}: is a stage of kind {recipe.stages[other].kind}. Allowed kinds for {role}: {kinds}."
