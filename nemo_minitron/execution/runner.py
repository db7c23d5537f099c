"""The runner: it runs the unfinished stages of a plan one after another and publishes their outputs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nemo_minitron import errors
from nemo_minitron.artifacts.manifest import Manifest, provenance
from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ArtifactError, DataError, Interrupted
from nemo_minitron.execution.attempts import begin_attempt
from nemo_minitron.execution.logs import log_file
from nemo_minitron.execution.preflight import preflight_evaluations
from nemo_minitron.execution.ranks import run_ranks
from nemo_minitron.execution.task import SESSION_FACTS, StageTask, run_task
from nemo_minitron.execution.work import accept_work, open_work
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan, StageCall, make_plan, refreshed
from nemo_minitron.plan.sources import changed_sources
from nemo_minitron.plan.text_amounts import too_little_text
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.disclosure import masked, write_private
from nemo_minitron.system.disk import disk_errors
from nemo_minitron.system.interrupts import StopRequest, stop_file_of_job
from nemo_minitron.system.notify import notify
from nemo_minitron.system.progress import Progress
from nemo_minitron.system.safe_files import copy_whole

CHANGED = "changed"


@dataclass(frozen=True)
class RunOptions:
    """Options of `minitron run` about stages that have outputs already, and about the stages to run."""

    rerun: tuple[str, ...] = ()
    """Stages to run again, with all stages that depend on them; `changed` means every changed stage."""
    accept_drift: bool = False
    """Whether to use finished outputs that no longer match the recipe, and resume trainings with other rates."""
    until: str | None = None
    """Run only this stage and the stages that it depends on."""


def run_recipe(recipe: Recipe, options: RunOptions, *, quiet: bool = False) -> RunPlan:
    """Plan a recipe and run it. Raise the errors of `run_plan`."""
    return run_plan(make_plan(recipe), options, quiet=quiet)


def run_plan(plan: RunPlan, options: RunOptions, *, quiet: bool = False) -> RunPlan:
    """Run every stage of the plan that has not finished; return the plan as it was before the first of them.

    Raises:
        MinitronError: the first problem; stages that have finished are kept.
        Interrupted: a stop was requested by SIGTERM, SIGUSR1 or a file STOP in the run's folder.
    """
    store = Store(run_dir(plan.recipe))
    stop = StopRequest(store.root)
    with disk_errors(store.root), store.lock(), stop.listening():
        plan = _settle(plan, options, store, stop, quiet=quiet)
        wanted = plan.needed_for(options.until)
        for call in plan.calls:
            if call.name in wanted and plan.states[call.name].status != "finished":
                _require_not_stopped(stop, f"before stage {call.name}")
                preflight_evaluations(call.name, plan.recipe, store, wanted)
                run_stage(call, plan.recipe, store, stop, quiet=quiet)
    return plan


def _require_not_stopped(stop: StopRequest, where: str) -> None:
    reason = stop.source()
    if reason is not None:
        raise Interrupted(f"Stopped {where} as requested by {reason}; the same command continues.")


def _settle_drift(plan: RunPlan, store: Store, options: RunOptions) -> RunPlan:
    """Apply --rerun and --accept-drift. Without either, raise ArtifactError if stages have changed."""
    if options.until is not None:
        _require_stage(plan, options.until)
    again = {name for name in options.rerun if name != CHANGED}
    for name in again:
        _require_stage(plan, name)
    if CHANGED in options.rerun:
        again |= _changed(plan)
    again = plan.followers(again)
    left = (_changed(plan) - again) & plan.needed_for(options.until)
    if left and not options.accept_drift:
        raise _drift_error(plan, left, store)
    while left:
        # Accepting a stage changes the fingerprints of its dependents, so accept one stage at a time, in order.
        call = next(call for call in plan.calls if call.name in left)
        manifest = store.manifest(call.name)
        assert manifest is not None
        store.accept_drift(call.fingerprint, manifest.fingerprint)
        plan = refreshed(plan)
        left = (_changed(plan) - again) & plan.needed_for(options.until)
    for name in again:
        store.supersede(name)
    return refreshed(plan) if again else plan


def _changed(plan: RunPlan) -> set[str]:
    return {call.name for call in plan.calls if plan.states[call.name].status == "changed"}


def _require_stage(plan: RunPlan, name: str) -> None:
    names = [call.name for call in plan.calls]
    if name not in names:
        raise errors.PlanError(f"There is no stage {name}.", allowed=", ".join([*names, CHANGED]))


def _drift_error(plan: RunPlan, left: set[str], store: Store) -> ArtifactError:
    ordered = [call.name for call in plan.calls if call.name in left]
    roots = [name for name in ordered if not set(plan.call(name).depends) & left]
    rerun = f"--rerun {roots[0]}" if len(roots) == 1 else f"--rerun {CHANGED}"
    lines = "\n".join(f"  - {name}: {plan.states[name].reason}" for name in ordered)
    return ArtifactError(
        f"The recipe no longer matches the outputs on disk:\n{lines}",
        where=str(store.root),
        next_step="one of\n"
        f"    {rerun}   run {', '.join(roots)} and all dependent stages again (old outputs are moved to .superseded)\n"
        "    name=NEW_NAME    keep this run and start another one\n"
        "    --accept-drift   continue with the old outputs",
    )


def run_single(recipe: Recipe, stage: str, *, patience_s: float = 0.0, quiet: bool = False) -> None:
    """Run one stage whose inputs have finished; runners of other stages may be active at the same time.

    Args:
        patience_s: how long to wait for another runner of the same stage to exit.

    Raises:
        PlanError: there is no such stage.
        ArtifactError: another runner works on the stage, an input is missing, or the stage on disk or one of its inputs
            was made with another recipe.
        Interrupted: a stop was requested.
    """
    store = Store(run_dir(recipe))
    stop = StopRequest(store.root, stop_file_of_job())
    with disk_errors(store.root), store.lock(stage, patience_s=patience_s), stop.listening():
        plan = make_plan(recipe)
        _require_stage(plan, stage)
        if plan.states[stage].status == "finished":
            return
        drifted = _changed(plan) & {stage, *plan.call(stage).depends}
        if drifted:
            raise _drift_error(plan, drifted, store)
        store.remove_leftovers(stage)
        store.require_free_paths([stage])
        preflight_evaluations(stage, plan.recipe, store, plan.recipe.stages)
        run_stage(plan.call(stage), plan.recipe, store, stop, quiet=quiet)


def settle(plan: RunPlan, options: RunOptions) -> RunPlan:
    """Prepare the run as `run_plan` does before its first stage: apply options, remove leftovers, write the recipe.

    Raises:
        MinitronError: the first problem.
    """
    store = Store(run_dir(plan.recipe))
    with disk_errors(store.root), store.lock():
        return _settle(plan, options, store, StopRequest(store.root), quiet=True)


def _settle(plan: RunPlan, options: RunOptions, store: Store, stop: StopRequest, *, quiet: bool) -> RunPlan:
    """Prepare the run. The caller holds the run's lock."""
    progress = Progress(silent=quiet)
    store.remove_leftovers()
    if stop.clear():
        progress.say(f"removed {stop.file}, which stopped an earlier run")
    # Another runner may have finished stages between planning and taking the lock.
    plan = _settle_drift(refreshed(plan), store, options)
    wanted = plan.needed_for(options.until)
    store.require_free_paths(wanted)
    for call in plan.calls if options.accept_drift else ():
        if call.name in wanted and plan.states[call.name].status != "finished":
            accept_work(call, store, progress)
    write_recipe(plan.recipe, store.paths.plan)
    return plan


def write_recipe(recipe: Recipe, file: Path) -> None:
    """Write the composed recipe for workers and jobs, readable only by the user: it may contain secrets."""
    write_private(file, json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n")


def run_stage(call: StageCall, recipe: Recipe, store: Store, stop: StopRequest, *, quiet: bool = False) -> None:
    """Run the stage, and report the outcome to `execution.notify_command`."""
    send = partial(notify, recipe.execution.notify_command, run=recipe.name, stage=call.name)
    try:
        _run_and_publish(call, recipe, store, stop, quiet=quiet)
    except (Interrupted, KeyboardInterrupt) as error:
        send(status="stopped", message=masked(str(error)))
        raise
    except BaseException as error:
        send(status="failed", message=masked(str(error)))
        raise
    send(status="finished")


def _run_and_publish(call: StageCall, recipe: Recipe, store: Store, stop: StopRequest, *, quiet: bool) -> None:
    """Run one stage in this process, or on the processes of its layout, and publish its output."""
    started_s = time.monotonic()
    inputs = store.inputs(call.inputs, "small" if STAGES[call.kind].reads_results else "unverified")
    progress = Progress(store.paths.progress(call.name), silent=quiet)
    progress.say(f"({call.kind})", call.name, "bold")
    for text in too_little_text(call.name, recipe.stages[call.name], store, recipe.stages):
        progress.warn(text)
    work, accepted = open_work(call, store, progress)
    earlier_s = begin_attempt(work, store.paths.progress(call.name))
    with store.building(call.name) as out, _published_names(out, call.name, store), log_file(store.root, call.name):
        task = StageTask.of(call, recipe, out, work)
        if call.parallel.world_size == 1 or not task.kind.distributed:
            result = run_task(task, inputs, progress, stop)
        else:
            result = run_ranks(task, stop)
        _require_same_sources(call, recipe)
        extra = {"session": result.pop(SESSION_FACTS, None), "accepted_work": accepted}
        manifest = Manifest(
            recipe=recipe.name,
            stage=call.name,
            kind=call.kind,
            fingerprint=call.fingerprint,
            payload=call.payload,
            inputs=call.inputs,
            result=result,
            provenance={**provenance(started_s, earlier_s), **{key: value for key, value in extra.items() if value}},
        )
        _copy_to_run(call, out, store.root)
        store.publish(call.name, out, manifest)


@contextmanager
def _published_names(out: Path, stage: str, store: Store) -> Iterator[None]:
    """Replace the temporary folder in error messages with the published one, because the former is deleted."""
    try:
        with disk_errors(store.root):
            yield
    except errors.MinitronError as error:
        error.rename(out.name, stage)
        raise


def _require_same_sources(call: StageCall, recipe: Recipe) -> None:
    """Check that no source outside the run has changed since planning; otherwise it is unknown what the stage read."""
    before = call.payload["sources"]
    for source, now in changed_sources(recipe.stages[call.name], recipe, before).items():
        found = "missing" if now is None else _size_in_words(now)
        raise DataError(
            f"The output of stage {call.name} is discarded: a source has changed since the run began.",
            where=f"{source}: it was {_size_in_words(before[source])}, and is {found}",
            next_step="Restore it, or wait until nothing writes to it; then run the same command again.",
        )


def _size_in_words(facts: Mapping[str, int]) -> str:
    return f"{facts['bytes']:,} bytes in {facts['files']} file{'s' * (facts['files'] != 1)}"


def _copy_to_run(call: StageCall, out: Path, root: Path) -> None:
    pattern = STAGES[call.kind].copied_to_run
    for file in out.glob(pattern) if pattern else ():
        copy_whole(file, root / file.name)
