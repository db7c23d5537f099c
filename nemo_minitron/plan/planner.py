"""Recipe -> ordered stage calls with fingerprints, and what has to be done about each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.schema import Parallel, Recipe, Schema, SelectionRules
from nemo_minitron.errors import PlanError
from nemo_minitron.plan.expansion import expand_searches
from nemo_minitron.plan.fingerprint import differences, fingerprint
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.sources import source_facts
from nemo_minitron.stages.spec import STAGES, params_of

InputNames = Mapping[str, Any]
"""role -> stage name, or a list or dict of stage names."""

_MODELS = (
    "import",
    "adopt",
    "init",
    "train",
    "correct",
    "distill",
    "distill_offline",
    "prune",
    "sft",
    "steerlm_sft",
    "dpo",
)
ROLE_KINDS: dict[str, tuple[str, ...]] = {
    "tokenizer": ("import", "adopt", "init"),
    "teacher": _MODELS,
    "model": (*_MODELS, "export"),
    "models": (*_MODELS, "export"),
    "like": _MODELS,
    "student": _MODELS,
    "data": ("tokenize",),
    "chats": ("chat_data", "annotate"),
    "attribute_model": ("train_attribute_model",),
    "reference": (*_MODELS, "export"),
    "cache": ("cache_teacher",),
    "check": ("check_teacher",),
    "scores": ("score",),
    "plan": ("select",),
    "evaluations": ("evaluate",),
    "search": ("search",),
    "candidates": ("candidate",),
    "rivals": ("candidate",),
}
"""Kinds of stage that can fill a role; roles that are not named take any."""


@dataclass(frozen=True)
class StageCall:
    """One stage as it will be called."""

    name: str
    kind: str
    inputs: InputNames
    params: Mapping[str, Any]
    parallel: Parallel
    payload: Mapping[str, Any]
    """What the fingerprint is made of."""
    fingerprint: str

    @property
    def depends(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_names(self.inputs)))


@dataclass(frozen=True)
class State:
    """What is to be done about a stage, and why."""

    status: str
    """finished, changed, or to run."""
    reason: str


@dataclass(frozen=True)
class RunPlan:
    """The whole run, in order."""

    recipe: Recipe
    calls: tuple[StageCall, ...]
    states: Mapping[str, State]

    def call(self, name: str) -> StageCall:
        return next(call for call in self.calls if call.name == name)

    def followers(self, names: set[str]) -> set[str]:
        """These stages and all that are made from them."""
        out = set(names)
        for call in self.calls:
            if out & set(call.depends):
                out.add(call.name)
        return out

    def needed_for(self, stage: str | None) -> set[str]:
        """The stage and all that it is made from; every stage for None."""
        out = {call.name for call in self.calls} if stage is None else {stage}
        for call in reversed(self.calls):
            if call.name in out:
                out.update(call.depends)
        return out


def make_plan(recipe: Recipe) -> RunPlan:
    """Order the stages, fingerprint them, and compare with what is on disk. Reads manifests, writes nothing.

    The plan's recipe is the given one with its searches written out as stages.

    Raises:
        PlanError: an input that is no stage, of the wrong kind, a cycle, or a search without candidates.
    """
    recipe = expand_searches(recipe)
    inputs = {name: _inputs_of(name, recipe) for name in recipe.stages}
    order = _order(inputs, recipe)
    store = Store(run_dir(recipe))
    accepted = store.accepted_drift()
    effective: dict[str, str] = {}
    calls = []
    for name in order:
        call = _call(name, recipe, inputs[name], effective, store)
        effective[name] = accepted.get(call.fingerprint, call.fingerprint)
        calls.append(call)
    return RunPlan(recipe, tuple(calls), _states(calls, store, effective))


def parallel_of(recipe: Recipe, stage: str) -> Parallel:
    """The layout of a stage: its own, the run's, or one process for stages that are not distributed."""
    if not STAGES[recipe.stages[stage].kind].has_layout:
        return Parallel()
    return recipe.execution.parallel_by_stage.get(stage, recipe.execution.parallel)


def _call(name: str, recipe: Recipe, inputs: InputNames, done: Mapping[str, str], store: Store) -> StageCall:
    stage = recipe.stages[name]
    params = params_of(stage)
    manifest = store.manifest(name)
    before = manifest.payload.get("sources", {}) if manifest else {}
    payload = {
        "kind": stage.kind,
        "version": STAGES[stage.kind].version,
        "params": params,
        "inputs": _replace_names(inputs, done),
        "sources": source_facts(stage, recipe, before),
    }
    return StageCall(
        name=name,
        kind=stage.kind,
        inputs=inputs,
        params=params,
        parallel=parallel_of(recipe, name),
        payload=payload,
        fingerprint=fingerprint(payload),
    )


def _states(calls: list[StageCall], store: Store, effective: Mapping[str, str]) -> dict[str, State]:
    states: dict[str, State] = {}
    for call in calls:
        manifest = store.manifest(call.name)
        moving = [name for name in call.depends if states[name].status != "finished"]
        if manifest is None:
            states[call.name] = State("to run", f"waits for {_few(moving)}" if moving else "not run yet")
        elif manifest.fingerprint == effective[call.name]:
            states[call.name] = _finished(call, effective, moving)
        else:
            states[call.name] = State("changed", _why_changed(manifest.payload, call, states))
    return states


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _finished(call: StageCall, effective: Mapping[str, str], moving: list[str]) -> State:
    if moving:
        return State("finished", f"same fingerprint; {', '.join(moving)} is made again the same way")
    if effective[call.name] != call.fingerprint:
        return State("finished", "drift accepted: the recipe has changed since")
    return State("finished", "same fingerprint")


def _why_changed(old: Mapping[str, Any], call: StageCall, states: Mapping[str, State]) -> str:
    own = differences({**old, "inputs": None}, {**call.payload, "inputs": None})
    if own:
        return "; ".join(diff.removeprefix("params.") for diff in own)
    because = [name for name in call.depends if states[name].status != "finished"]
    return f"because {', '.join(because)} changes" if because else "its inputs are others than before"


def _inputs_of(name: str, recipe: Recipe) -> InputNames:
    stage = recipe.stages[name]
    inputs: dict[str, Any] = {role: value for role, value in _schema_dict(stage.inputs).items() if value is not None}
    if stage.kind == "report" and "stages" not in inputs:
        inputs["stages"] = [other for other, config in recipe.stages.items() if config.kind != "report"]
    rules = stage if isinstance(stage, SelectionRules) else getattr(stage, "selection", None)
    if rules is not None and rules.method != "importance":
        inputs.pop("scores", None)
    return {role: value for role, value in inputs.items() if value}


def _schema_dict(inputs: Schema) -> dict[str, Any]:
    return inputs.model_dump(mode="json")


def _names(inputs: InputNames) -> Iterator[str]:
    for value in inputs.values():
        if isinstance(value, str):
            yield value
        else:
            yield from (value.values() if isinstance(value, Mapping) else value)


def _replace_names(inputs: InputNames, done: Mapping[str, str]) -> dict[str, Any]:
    """Input names -> fingerprints."""

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
        raise PlanError(f"Stages wait for each other: {' -> '.join(error.args[1])}.") from None
    # Among stages that could run, the recipe's own order decides.
    listed = list(recipe.stages)
    out: list[str] = []
    while sorter.is_active():
        for name in sorted(sorter.get_ready(), key=listed.index):
            out.append(name)
            sorter.done(name)
    return out


def _input_problems(name: str, roles: InputNames, recipe: Recipe) -> Iterator[str]:
    for role, value in roles.items():
        for other in _names({role: value}):
            key = f"stages.{name}.inputs.{role} = {other}"
            if other not in recipe.stages:
                yield f"{key}: there is no such stage. Stages: {', '.join(recipe.stages)}."
            elif role in ROLE_KINDS and recipe.stages[other].kind not in ROLE_KINDS[role]:
                kinds = ", ".join(ROLE_KINDS[role])
                yield f"{key}: is a {recipe.stages[other].kind} stage; {role} needs one of: {kinds}."
