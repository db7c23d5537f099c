"""`make token-ratio`: how many tokens a repair by least squares saves, by the rule of docs/explanation/token-ratio.md.

Trains every arm at three budgets with paired seeds, one run after another, and prints tables, verdicts and a picture.
If the teacher was trained here, the student's shape is also trained from random weights, on up to 30x the tokens.
Finished runs are skipped, so a stopped suite continues with the same command. Sizes: toy and smollm2 (two CPU cores),
gpu (SmolLM2-135M, larger budgets), smoke (tests that the suite runs).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pages import replace_part
from suite import (
    ROOT,
    Found,
    Stages,
    Task,
    add_published,
    explicit_stages,
    matching_figures,
    prepare,
    publish_figures,
    run_folder,
    run_task,
    run_tasks,
)
from token_ratio_arms import (
    ARMS,
    BASELINE,
    LAYERS_KIND,
    SWEEP_SEED,
    Run,
    calibration_tokens,
    start_stages,
    task_of,
    usable_arms,
)
from token_ratio_claims import SCRATCH, SCRATCH_AGAINST, Design, page, picture

RECIPES = ROOT / "recipes/claims"
RATES, BATCHES = (1 / 3, 1.0, 3.0), (0.5, 2.0)
"""Factors of the learning rate, at the batch of the recipe, and of the batch, at the best of these rates."""
SCRATCH_MULTIPLES = (10, 30)
"""Budgets of the model from scratch, over the tokens that the repaired student has read at its smallest budget."""

_SOURCES = """stages.data.sources=[{{source: '{}', document_separator: "\\f"}}]"""


@dataclass(frozen=True)
class Size:
    """Budgets and seeds of the suite for one teacher."""

    recipe: str
    budgets: tuple[int, ...]
    """Training tokens."""
    seeds: tuple[int, ...]
    """Seeds of the order of the text and of the draw of the calibration text."""
    overrides: tuple[str, ...] = ()


SIZES = {
    "toy": Size("token_ratio_toy", (163_840, 655_360, 2_621_440), (1, 2, 3)),
    "smollm2": Size("token_ratio_smollm2", (65_536, 131_072, 262_144), (1, 2)),
    "gpu": Size(
        "token_ratio_smollm2",
        (16_777_216, 67_108_864, 268_435_456),
        (1, 2, 3),
        overrides=(
            "name=claims/token_ratio_gpu",
            _SOURCES.format("./data/*.txt*"),
            "stages.score={num_samples: 512, seq_len_tokens: 1024}",
            "stages.compensate={num_samples: 512, seq_len_tokens: 1024, heldout_tokens: 65536}",
            "stages.distill={global_batch_size: 64, seq_len_tokens: 1024, valid_num_tokens: 65536}",
            "stages.evaluate={num_tokens: 262144, seq_len_tokens: 1024}",
            "execution.device=cuda",
            "execution.parallel.micro_batch_size=16",
        ),
    ),
    "smoke": Size(
        "token_ratio_toy",
        (5_120, 10_240),
        (1,),
        overrides=(
            "name=claims/token_ratio_smoke",
            "stages.teacher_init.tokenizer.sources.0.max_documents=1000",
            "stages.data.sources.0.max_documents=2000",
            "stages.teacher={num_steps: 20, warmup_steps: 2, valid_num_tokens: 1024}",
            "stages.score.num_samples=8",
            "stages.compensate={num_samples: 48, heldout_tokens: 1024}",
            "stages.distill={global_batch_size: 4, valid_num_tokens: 1024}",
            "stages.evaluate.num_tokens=2048",
            "execution.parallel_by_stage.teacher={dp: 1, micro_batch_size: 16}",
        ),
    ),
}


def budgets_of(arm: str, size: Size, recipe: Stages) -> tuple[int, ...]:
    """Return the training tokens of the runs of an arm that count."""
    if not ARMS[arm].from_scratch:
        return size.budgets
    made, _ = start_stages(Run(SCRATCH_AGAINST, size.budgets[0], size.seeds[0]), recipe)
    read = size.budgets[0] + calibration_tokens(made)
    return tuple(multiple * read for multiple in SCRATCH_MULTIPLES)


def sweep(arm: str, size: Size, found: Found) -> list[Run]:
    """Return the runs of the sweep of an arm: all rates, then other batches at the best rate so far."""
    budget = size.budgets[1] if ARMS[arm].from_scratch else size.budgets[0]
    runs = [Run(arm, budget, SWEEP_SEED, rate=rate) for rate in RATES]
    best = _best(runs, found)
    return runs + [replace(best, batch=batch) for batch in BATCHES]


def _best(runs: Sequence[Run], found: Found) -> Run:
    """Return the finished run with the lowest loss on the training text's held-out part; without one, the recipe's."""
    finished = [run for run in runs if run.id in found]
    default = Run(runs[0].arm, runs[0].budget, runs[0].seed)
    return min(finished, key=lambda run: own_loss(found[run.id]), default=default)


def own_loss(row: dict[str, Any]) -> float:
    """Return the final loss on held-out text of the training text."""
    return float(row["figures"]["own"]["loss_nats_per_token"])


def suite_runs(size: Size, budgets: Mapping[str, Sequence[int]], found: Found) -> list[Run]:
    """Return all runs in their order: the sweeps, then the budgets, smallest first, with all arms of a seed together.

    Args:
        budgets: arm -> training tokens of its runs.

    As long as a sweep is not finished, the runs of its arm stand there with the best rate and batch so far.
    """
    sweeps = {arm: sweep(arm, size, found) for arm in budgets}
    best = {arm: _best(runs, found) for arm, runs in sweeps.items()}
    counting = [
        replace(best[arm], budget=budget, seed=seed)
        for budget in sorted({budget for mine in budgets.values() for budget in mine})
        for seed in size.seeds
        for arm, mine in budgets.items()
        if budget in mine
    ]
    return [run for runs in sweeps.values() for run in runs] + counting


def selected(runs: Iterable[Run], budgets: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    """Return the sweeps, and the other runs of these budgets and seeds; empty: all."""
    return [
        run
        for run in runs
        if run.seed == SWEEP_SEED or ((not budgets or run.budget in budgets) and (not seeds or run.seed in seeds))
    ]


def arguments_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of models and figures")
    parser.add_argument("--only", action="append", default=[], choices=ARMS, help="an arm; can be repeated")
    parser.add_argument("--budget", action="append", default=[], type=int, help="training tokens; can be repeated")
    parser.add_argument("--seed", action="append", default=[], type=int, help="can be repeated")
    parser.add_argument("--limit-minutes", type=float, help="stop before a run that would end later")
    parser.add_argument("--text", help="path or glob of the training text, documents separated by form feeds")
    parser.add_argument("--shared-machine", action="store_true", help="other work runs here: no verdicts on times")
    parser.add_argument("--with-published", action="store_true", help="skip the runs whose figures docs/ has")
    parser.add_argument("--report", action="store_true", help="run nothing; print what is measured so far")
    parser.add_argument("--write-docs", action="store_true", help="also write the results into docs/results.md")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the recipe")
    found = parser.parse_intermixed_args(arguments)
    size = SIZES[found.size]
    for name, allowed in (("budget", size.budgets), ("seed", size.seeds)):
        wrong = set(getattr(found, name)) - set(allowed)
        if wrong:
            parser.error(f"--{name} {min(wrong)}: the size {found.size} has {', '.join(map(str, allowed))}")
    return found


def main() -> None:
    from nemo_minitron import api
    from nemo_minitron.stages.registry import STAGES

    arguments = arguments_of()
    size = SIZES[arguments.size]
    text = [] if arguments.text is None else [_SOURCES.format(arguments.text)]
    overrides = [f"execution.run_root={arguments.root}", *size.overrides, *text, *arguments.overrides]
    recipe = api.load_recipe(RECIPES / f"{size.recipe}.yaml", overrides)
    stages, micro_batch_size = explicit_stages(recipe), recipe.execution.parallel.micro_batch_size
    arms = [name for name in usable_arms(STAGES, stages) if not arguments.only or name in arguments.only]
    for name in (name for name in arguments.only or ARMS if name not in arms):
        missing = (
            f"there is no kind of stage {LAYERS_KIND}" if ARMS[name].layers else "the teacher was not trained here"
        )
        print(f"{name} is skipped: {missing}.")
    budgets = {arm: budgets_of(arm, size, stages) for arm in arms}
    folder = run_folder(recipe)
    file = folder / "token_ratio.jsonl"

    def tasks_of(found: Found) -> list[Task]:
        return [task_of(Run(**row["run"]), stages, micro_batch_size) for row in found.values()]

    def waiting(found: Found) -> list[Task]:
        runs = selected(suite_runs(size, budgets, found), arguments.budget, arguments.seed)
        return [task_of(run, stages, micro_batch_size) for run in runs if run.id not in found]

    if arguments.with_published:
        add_published(file, f"token_ratio_{arguments.size}", tasks_of)
    found = matching_figures(file, tasks_of)
    if not arguments.report:
        spent_s = prepare(recipe, ("teacher", "data", "other", "judge"))
        limit_s = None if arguments.limit_minutes is None else 60 * arguments.limit_minutes - spent_s
        about_machine = {"shared_machine": True} if arguments.shared_machine else {}

        def measure(task: Task) -> dict[str, Any]:
            return {**run_task(task, recipe), **about_machine}

        found = run_tasks(waiting, measure, file, folder, limit_s=limit_s)
    design = Design(BASELINE, size.budgets, size.seeds, budgets_of(SCRATCH, size, stages))
    publish(found, design, arguments.size, folder, write_docs=arguments.write_docs)


def publish(found: Found, design: Design, size: str, folder: Path, *, write_docs: bool) -> None:
    """Print the results and store them in the run folder; with `write_docs` also in docs/, with their figures."""
    rows = list(found.values())
    name = f"token_ratio_{size}"
    text = page(rows, design, size, f"{name}.png")
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    folders = [folder, *([ROOT / "docs"] if write_docs else [])]
    if any(not row["is_sweep"] for row in rows):
        for place in folders:
            picture(rows, place / f"{name}.png")
        picture(rows, folder / f"{name}.svg")
    (folder / f"{name}.md").write_text(text + "\n")
    if write_docs:
        publish_figures(found, name)
        begin = f"<!-- token ratio, {size}: made by `make token-ratio` -->"
        replace_part(ROOT / "docs/results.md", begin, f"<!-- end of token ratio, {size} -->", text)


if __name__ == "__main__":
    main()
