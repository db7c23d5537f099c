"""Suites of runs: each task is a small recipe in a shared run folder; its figures are a line of a JSON-lines file.

Finished tasks are skipped, so a stopped suite continues with the same command, and with the published figures on
another machine.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from nemo_minitron.artifacts.manifest import MANIFEST_FILE
from nemo_minitron.artifacts.run_paths import RunPaths
from nemo_minitron.errors import Interrupted
from nemo_minitron.system.duration import duration
from nemo_minitron.system.safe_files import write_whole

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "docs/figures"
"""Folder of the figures behind the tables of docs/results.md."""
Stages = dict[str, dict[str, Any]]
Found = dict[str, dict[str, Any]]
"""Id of a task -> its line in the file of figures."""
MEASURE_AGAIN = "move the file away to run them again, or give this suite another name: name=claims/NAME."


@dataclass(frozen=True)
class Task:
    """One run of a suite."""

    id: str
    group: str
    """Tasks of a group take about the same time per unit of work."""
    work: float
    """Amount of work, such as training tokens, by which the time is estimated."""
    stages: Stages
    """All stages of the run, including those that it shares with other tasks."""
    measures: Mapping[str, str]
    """Name of a figure -> evaluate stage that measures it."""
    temporary: tuple[str, ...] = ()
    """Stages whose outputs are deleted once the figures are on disk."""
    micro_batch_size: int | None = None
    """Sequences per forward pass. None: as in the recipe."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the task that are stored with its figures."""

    @property
    def made_from(self) -> str:
        """Hash of the versions and keys of the stages that the figures depend on; default values are left out."""
        from nemo_minitron.stages.registry import STAGES

        facts = {
            name: [STAGES[stage.kind].version, stage.model_dump(mode="json", exclude_defaults=True)]
            for name, stage in _validated(self.stages).items()
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def sources(self) -> dict[str, dict[str, int]]:
        """Number and size of the files outside the run that the stages read, as they are now.

        Assets are left out, because their content never changes, and so is what no longer exists.
        """
        from nemo_minitron.hf.source import ASSET
        from nemo_minitron.plan.sources import listed_files, sources_of

        read = [source for stage in _validated(self.stages).values() for source in sources_of(stage)]
        found = {source.location: listed_files(source, Path()) for source in read}
        return {
            location: {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
            for location, files in found.items()
            if files and not location.startswith(ASSET)
        }


def _validated(stages: Stages) -> dict[str, Any]:
    from nemo_minitron.stages.registry import STAGES

    return {name: STAGES[stage["kind"]].params.model_validate(stage) for name, stage in stages.items()}


def needed_stages(stages: Stages, wanted: Sequence[str]) -> Stages:
    """Return the wanted stages and all stages that they read, in the order of `stages`."""
    needed: set[str] = set()
    waiting = [*wanted]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += _inputs_of(stages[name])
    return {name: stage for name, stage in stages.items() if name in needed}


def explicit_stages(recipe: Any) -> Stages:
    """Return the stages of a loaded recipe with all keys and inputs, defaults included."""
    return dict(recipe.model_dump(mode="json")["stages"])


def _inputs_of(stage: Mapping[str, Any]) -> list[str]:
    out: list[str] = []
    for value in stage["inputs"].values():
        if isinstance(value, str):
            out.append(value)
        elif isinstance(value, list):
            out += value
        elif isinstance(value, dict):
            out += value.values()
    return out


def prepare(recipe: Any, names: Sequence[str]) -> float:
    """Run the stages that all tasks share, such as the teacher, and return the seconds that it took."""
    started_s = time.monotonic()
    _run_stages(recipe, needed_stages(explicit_stages(recipe), names), "shared stages")
    return time.monotonic() - started_s


def run_task(task: Task, recipe: Any) -> dict[str, Any]:
    """Run the stages of a task in the run folder of the recipe, and return its figures.

    `wall_s` has the seconds of each stage, and `resumed` the stages that had been interrupted, whose seconds are
    therefore incomplete.
    """
    resumed = _run_stages(recipe, task.stages, task.id, task.micro_batch_size)
    paths = RunPaths(run_folder(recipe))
    manifests = {name: json.loads((paths.published(name) / MANIFEST_FILE).read_text()) for name in task.stages}
    figures = {
        name: {key: manifests[stage]["result"][key] for key in ("loss_nats_per_token", "bits_per_byte")}
        for name, stage in task.measures.items()
    }
    wall_s = {name: manifest["provenance"]["wall_s"] for name, manifest in manifests.items()}
    gc.collect()  # Megatron's models refer to themselves.
    return {"figures": figures, "wall_s": wall_s, "resumed": [name for name in task.stages if name in resumed]}


def _run_stages(recipe: Any, stages: Stages, where: str, micro_batch_size: int | None = None) -> set[str]:
    """Run stages with the execution of the recipe; return all stages of the run that were ever interrupted."""
    from nemo_minitron import api
    from nemo_minitron.config.explain import validate

    raw = {**recipe.model_dump(mode="json"), "stages": stages}
    if micro_batch_size is not None:
        raw["execution"]["parallel"]["micro_batch_size"] = micro_batch_size
    layouts = raw["execution"]["parallel_by_stage"]
    raw["execution"]["parallel_by_stage"] = {name: layouts[name] for name in layouts if name in stages}
    plan = api.plan(validate(raw, where=where))
    paths = RunPaths(run_folder(recipe))
    unfinished = [call.name for call in plan.calls if plan.states[call.name].status != "finished"]
    # Kept in a file: a stage that was interrupted may finish in a process that is stopped before its task is done.
    file = run_folder(recipe) / "interrupted_stages.json"
    interrupted = set(json.loads(file.read_text()) if file.is_file() else [])
    interrupted |= {name for name in unfinished if paths.work(name).exists()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(sorted(interrupted)))
    api.run(plan, quiet=True)
    return interrupted


def run_folder(recipe: Any) -> Path:
    """Return the folder of a recipe's run."""
    from nemo_minitron.plan.folder import run_dir

    return run_dir(recipe)


def read_figures(file: Path) -> Found:
    """Read the file of figures, without a last line that was cut off by a kill."""
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in _whole_lines(file.read_bytes()).decode().splitlines()]
    return {row["id"]: row for row in rows}


def append_figures(file: Path, row: Mapping[str, Any]) -> None:
    """Add one line, in place of a last one that was cut off by a kill, and flush it to disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    with file.open("r+b") as opened:
        whole = len(_whole_lines(opened.read()))
        opened.truncate(whole)
        opened.seek(whole)
        opened.write(json.dumps(row).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def publish_figures(found: Found, name: str, folder: Path = PUBLISHED) -> None:
    """Store the figures of a suite with the documents that show them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.values()))


def matching_figures(file: Path, tasks_of: Callable[[Found], Sequence[Task]], next_step: str = MEASURE_AGAIN) -> Found:
    """Read a file of figures, and refuse it if it has some of other models, texts or keys.

    Args:
        tasks_of: the tasks that such figures would come from.
    """
    found = read_figures(file)
    require_same_origin(found, tasks_of(found), file, next_step)
    return found


def add_published(file: Path, name: str, tasks_of: Callable[[Found], Sequence[Task]], folder: Path = PUBLISHED) -> None:
    """Add the published figures of a suite that a file of figures lacks, without their value for claims about time.

    Raises:
        SystemExit: nothing is published for this suite, or the figures in one of the files are of other models, texts
            or keys. Nothing has been added then.
    """
    published = folder / f"{name}.jsonl"
    if not published.is_file():
        there = ", ".join(sorted(other.stem for other in folder.glob("*.jsonl"))) or "none"
        raise SystemExit(f"{published}: no such file. Published figures: {there}. Next: leave out --with-published.")
    found = matching_figures(file, tasks_of)
    leave_out = "leave out --with-published, or use the text and keys of the recipe without changes."
    for row in matching_figures(published, tasks_of, leave_out).values():
        if row["id"] not in found:
            append_figures(file, {**row, "shared_machine": True})


def require_same_origin(found: Found, tasks: Sequence[Task], file: Path, next_step: str = MEASURE_AGAIN) -> None:
    """Refuse to mix figures of other models, texts, keys or versions of a stage: they would compare nothing.

    Raises:
        SystemExit: a finished task was made from other stages or files.
    """
    other = [task.id for task in tasks if task.id in found and not _is_origin(task, found[task.id])]
    if other:
        more = "; ..." if len(other) > 3 else ""
        raise SystemExit(
            f"{file} has figures of other models, texts, keys or versions of a stage "
            f"({len(other)} runs: {'; '.join(other[:3])}{more}).\nNext: {next_step}"
        )


def _is_origin(task: Task, row: Mapping[str, Any]) -> bool:
    files = row.get("sources", {})
    is_same_text = all(files.get(location) == now for location, now in task.sources.items())
    return bool(row["made_from"] == task.made_from) and is_same_text


def estimated_s(task: Task, found: Found) -> float | None:
    """Estimate the seconds of a task from finished ones; None: there are none.

    The closest tasks count: of the same group and amount of work, else of the group, else all.
    """
    rows = list(found.values())
    same = [row for row in rows if row["group"] == task.group]
    exact = [row for row in same if row["work"] == task.work]
    closest = exact or same or rows
    return task.work * median(row["elapsed_s"] / row["work"] for row in closest) if closest else None


def run_tasks(
    waiting: Callable[[Found], Sequence[Task]],
    measure: Callable[[Task], dict[str, Any]],
    file: Path,
    folder: Path,
    *,
    limit_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Run one task after another, store the figures of each, and then delete its temporary stages; return all figures.

    Args:
        waiting: unfinished tasks, the next one first. Later ones may change with the figures of earlier ones.
        measure: runs a task.
        folder: of the run.
        limit_s: stop before a task that would probably end after these seconds.

    Raises:
        SystemExit: a stop was requested during a task, which is run again or resumed next time.
    """
    found, started_s = read_figures(file), clock()
    while tasks := waiting(found):
        task, began_s = tasks[0], clock()
        expected = estimated_s(task, found) or 0.0
        if limit_s is not None and began_s - started_s + expected > limit_s:
            print(f"stopped before {task.id}: it would exceed the time limit. The same command continues.", flush=True)
            break
        print(f"{task.id} ... {len(tasks)} runs left, {_expected(remaining_s(tasks, found))}", flush=True)
        try:
            measured = measure(task)
        except (KeyboardInterrupt, Interrupted):
            raise SystemExit(f"stopped in {task.id}; the same command continues.") from None
        about_task = {"id": task.id, "group": task.group, "work": task.work}
        origin = {"made_from": task.made_from, "sources": task.sources}
        row = {**about_task, **origin, "elapsed_s": clock() - began_s, **task.facts, **measured}
        append_figures(file, row)
        delete_temporary(task, folder)
        found[task.id] = row
        losses = ", ".join(f"{name} {figure['loss_nats_per_token']:.4f}" for name, figure in row["figures"].items())
        print(f"  loss: {losses}; {duration(row['elapsed_s'])}", flush=True)
    return found


def delete_temporary(task: Task, folder: Path) -> None:
    """Delete what the temporary stages of a task have left in the folder of the run."""
    paths = RunPaths(folder)
    for name in task.temporary:
        for place in (paths.published(name), paths.work(name)):
            shutil.rmtree(place, ignore_errors=True)


def _expected(seconds: float | None) -> str:
    return "which take an unknown time" if seconds is None else f"about {duration(seconds)}"


def remaining_s(tasks: Sequence[Task], found: Found) -> float | None:
    """Estimate the seconds of all tasks; None: nothing has finished yet."""
    times = [estimated_s(task, found) for task in tasks]
    return sum(value for value in times if value is not None) if times and None not in times else None
