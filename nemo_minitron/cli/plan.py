"""`minitron plan`: what would run and why, with sizes, memory, time and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from nemo_minitron import api
from nemo_minitron.cli.arguments import Overrides, RecipeFile
from nemo_minitron.cli.output import STATUS_STYLES, console, print_warnings
from nemo_minitron.families.axes import AXES, LAYERS, Axis
from nemo_minitron.families.shape import SIZE_AXES, SIZE_COLUMNS
from nemo_minitron.system.heap import skip_collection_at_exit
from nemo_minitron.system.terminal import write

if TYPE_CHECKING:
    from nemo_minitron.plan.planner import RunPlan


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Show what `run` would do, and why; the sizes of the models; memory, time, cost and disk of each stage."""
    skip_collection_at_exit()
    found = api.load_plan(recipe, overrides, checked=False)

    from nemo_minitron.plan.checks import find_problems
    from nemo_minitron.plan.describe import plan_facts
    from nemo_minitron.plan.heldout_rows import heldout_warnings
    from nemo_minitron.plan.resources.summary import memory_warnings, resource_facts
    from nemo_minitron.plan.text_amounts import text_warnings

    problems = [*find_problems(found), *_missing_for_launch(found)]
    resources = resource_facts(found)
    facts = {**plan_facts(found), "problems": problems, "resources": resources}
    facts["warnings"] = [
        *heldout_warnings(found.recipe.stages),
        *text_warnings(found),
        *memory_warnings(found, resources),
    ]
    if as_json:
        write(json.dumps(facts, indent=2))
        return
    _print_models(facts)
    _print_candidates(facts["candidates"])
    _print_stages(found)
    _print_resources(resources)
    print_warnings(facts["warnings"])
    for problem in problems:
        console.say(problem, "problem", "red")


def _missing_for_launch(found: RunPlan) -> list[str]:
    """List what the launcher would not find on this machine; the launchers are loaded only if a site is named."""
    if found.recipe.execution.cluster is None:
        return []
    from nemo_minitron.launch.probe import missing_here

    return missing_here(found)


def _print_models(facts: dict[str, Any]) -> None:
    for role in ("teacher", "student"):
        model = facts[role]
        if model is None:
            until = "the search has found it" if role == "student" and facts["candidates"] else "it is imported"
            console.say(f"{role}: unknown until {until}")
            continue
        share = f" ({model['share']:.1%} of the teacher)" if "share" in model else ""
        console.say(f"{model['num_params']:,} parameters{share}: {_sizes(model)}", role, "bold")


def _sizes(model: Mapping[str, int]) -> str:
    """Format the sizes of a model, such as `4 layers, hidden 64, heads 8/4 groups of 16`."""
    return ", ".join(_size(model, *column) for column in SIZE_COLUMNS)


def _size(model: Mapping[str, int], axis: Axis, *holders: Axis) -> str:
    size = model[axis.target_key]
    text = f"{size} {axis.name}" if axis is LAYERS else f"{axis.name} {size}"
    text += "".join(f"/{model[holder.target_key]} {holder.name}" for holder in holders)
    return text if axis.unit is None else f"{text} of {model[axis.unit]}"


def _print_candidates(candidates: list[dict[str, Any]]) -> None:
    if not candidates:
        return
    table = Table(title=f"{len(candidates)} candidates")
    columns = {
        "name": "name",
        "num_params": "parameters",
        **{axis.target_key: axis.name for axis in SIZE_AXES if axis in AXES},
    }
    for column in (*columns.values(), "memory, GiB", "token, ms"):
        table.add_column(column, justify="right")
    for found in candidates:
        sizes = (f"{found[key]:,}" if key == "num_params" else str(found[key]) for key in columns)
        table.add_row(*sizes, f"{found['memory_gib']:.2f}", f"{found['decode_ms']:.2f}")
    console.print(table)


def _print_stages(found: RunPlan) -> None:
    table = Table(title=found.recipe.name)
    for column in ("stage", "kind", "processes", "status", "why"):
        table.add_column(column)
    for call in found.calls:
        state = found.states[call.name]
        style = STATUS_STYLES[state.status]
        processes = str(call.parallel.world_size)
        table.add_row(call.name, call.kind, processes, Text(state.status, style), state.reason)
    console.print(table)


def _print_resources(resources: dict[str, Any]) -> None:
    if resources["stages"]:
        _print_estimates(resources)
    for stage, lines in resources["proposals"].items():
        for number, line in enumerate(lines):
            console.say(f"{'fits ' + stage if not number else ' ' * (5 + len(stage))}: {line['words']}")
    if resources["not_estimated"]:
        console.say(f"not estimated and not in the total: {', '.join(resources['not_estimated'])}")
    _print_batches(resources["batches"])


def _print_estimates(resources: dict[str, Any]) -> None:
    assumed = resources["assumptions"]
    console.print(_memory_table(resources))
    console.print(_time_table(resources))
    total = resources["totals"]
    cost = "" if total["cost"] is None else f", cost {total['cost']:,.0f}"
    uncounted = resources["with_uncounted_tasks"]
    tasks = f" (without the tasks of {', '.join(uncounted)})" if uncounted else ""
    slower = assumed["fp32_tflops"]
    fp32 = "" if slower == assumed["peak_tflops"] else f" ({slower:g} in fp32)"
    console.say(
        f"total: {total['hours']:.1f} hours one after the other{tasks}, {total['gpu_hours']:,.0f} GPU-hours{cost}, "
        f"{total['disk_gib']:.1f} GiB of disk. Assumed: {assumed['peak_tflops']:g} TFLOPS of each process{fp32}, "
        f"MFU {assumed['mfu']:.0%} ({assumed['mfu_from']}). docs/how-to/planning.md",
    )
    bounds = [name for name, facts in resources["stages"].items() if facts["is_bound"]]
    if bounds:
        console.say(f"with the sizes of the largest candidate, until the search has finished: {', '.join(bounds)}")


def _print_batches(batches: dict[str, Any]) -> None:
    """Propose a smaller batch for trainings with few tokens whose batch is far above that of the rule."""
    for stage, facts in batches.items():
        if not facts["is_too_large"]:
            continue
        numbers = {key: f"{facts[key]}" for key in ("global_batch_size", "num_steps", "warmup_steps")}
        numbers |= {"adam_beta2": f"{facts['adam_beta2']:.5g}", "weight_decay": f"{facts['weight_decay']:.3g}"}
        keys = "{" + ", ".join(f"{key}: {value}" for key, value in numbers.items()) + "}"
        batch, tokens, best = (_short(facts[key]) for key in ("batch_tokens", "num_tokens", "best_batch_tokens"))
        console.say(
            f"batch of {stage}: {batch} tokens a step; for {tokens} tokens the rule in docs/how-to/distillation.md "
            f"gives {best}: {keys}"
        )


# Two tables, so that no figure is cut in 80 columns.
def _memory_table(resources: dict[str, Any]) -> Table:
    parts: dict[str, tuple[str, ...]] = {
        "weights": ("weights",),
        "teacher": ("teacher",),
        "grads": ("gradients",),
        "Adam": ("optimizer",),
        "activa-\ntions": ("activations",),
        "loss": ("loss",),
    }
    rare = {"hidden_states": "hid-\nden", "sums": "sums"}
    every = [facts["memory"] for facts in resources["stages"].values()]
    shown = tuple(part for part in rare if any(memory[f"{part}_gib"] for memory in every))
    if shown:
        # One column, because 80 characters have no room for two.
        parts[",\n".join(rare[part] for part in shown)] = shown
    table = _table("GiB of a process", "peak", *parts)
    for name, facts in resources["stages"].items():
        memory = facts["memory"]
        peak = f"{memory['peak_gib']:.2f}"
        table.add_row(
            name,
            peak if facts["fits"] else Text(peak, "red"),
            *(f"{sum(memory[part + '_gib'] for part in column):.2f}" for column in parts.values()),
        )
    return table


def _time_table(resources: dict[str, Any]) -> Table:
    assumed = resources["assumptions"]
    money = ("cost",) if assumed["price_per_gpu_hour"] is not None else ()
    columns = ("tokens", "tokens/s", "hours", "GPU-\nhours", *money, "disk,\nGiB")
    table = _table(f"what it takes on {assumed['hardware']}", *columns)
    for name, facts in resources["stages"].items():
        table.add_row(
            name,
            _short(facts["tokens"]),
            _short(facts["tokens_per_s"] or 0),
            f"{facts['hours']:.2f}",
            f"{facts['gpu_hours']:,.1f}",
            *((f"{facts['cost']:,.0f}",) if money else ()),
            f"{facts['disk_gib']:.2f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _short(number: float) -> str:
    """Format a count as 12.3K or 94.0B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"
