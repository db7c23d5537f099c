"""`make token-ratio`: how many tokens a repair by least squares saves, by the rule of docs/explanation/token-ratio.md.

Trains every arm at three budgets with paired seeds, one run after another, and prints tables, verdicts and a picture.
Finished runs are skipped, so a stopped suite continues with the same command. Sizes: toy and smollm2 (two CPU cores),
gpu (SmolLM2-135M, larger budgets), smoke (tests that the suite runs).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from suite import (
    Found,
    Stages,
    Task,
    explicit_stages,
    needed_stages,
    prepare,
    read_figures,
    replace_part,
    require_same_origin,
    run_folder,
    run_task,
    run_tasks,
)
from token_ratio_claims import Design, page, picture

from nemo_minitron.schema.base import FITTING_SEED

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes/claims"
RATES, BATCHES = (1 / 3, 1.0, 3.0), (0.5, 2.0)
"""Factors of the learning rate, at the batch of the recipe, and of the batch, at the best of these rates."""
SWEEP_SEED = 0
"""Seed of the sweep; none of the seeds that count."""
LAYER_SHARE = 0.25
"""Share of the budget that layer-local distillation gets in its arm."""


_SOURCES = "stages.data.sources=[{{source: '{}', document_separator: '\\f'}}]"


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


@dataclass(frozen=True)
class Arm:
    """How a student is made before its distillation."""

    score: str = "activation"
    """`method` of the score stage."""
    mode: str | None = None
    """`mode` of the compensate stage. None: the student is only sliced."""
    layers: bool = False
    """Whether the layers are distilled one by one first."""


BASELINE = "sliced"
ARMS = {
    BASELINE: Arm(),
    "sliced_wanda": Arm(score="wanda"),
    "compensated": Arm(mode="one_shot"),
    "sequential": Arm(mode="sequential"),
    "compensated_layers": Arm(mode="one_shot", layers=True),
}
LAYERS_KIND = "distill_layers"


@dataclass(frozen=True)
class Run:
    """One student, trained once; the learning rate decays to the end of the budget."""

    arm: str
    budget: int
    seed: int
    rate: float = 1.0
    """Factor of the learning rate of the recipe."""
    batch: float = 1.0
    """Factor of the batch of the recipe."""

    @property
    def id(self) -> str:
        sweep = "sweep: " if self.seed == SWEEP_SEED else ""
        return (
            f"{sweep}{self.arm}, {self.budget:,} tokens, seed {self.seed}, rate x {self.rate:.3g}, "
            f"batch x {self.batch:g}"
        )

    @property
    def slug(self) -> str:
        """Suffix of the names of stages that belong to this run alone."""
        rate, batch = (f"{factor:.3g}".replace(".", "p") for factor in (self.rate, self.batch))
        return f"{self.arm}_{self.budget}_s{self.seed}_r{rate}_b{batch}"


def usable_arms(kinds: Iterable[str]) -> list[str]:
    """Return the arms whose kinds of stage exist."""
    return [name for name, arm in ARMS.items() if not arm.layers or LAYERS_KIND in kinds]


def fitting_seed(run: Run) -> int:
    """Return the seed of what fits the student before its distillation, which must not begin with the same text."""
    return FITTING_SEED + run.seed


def start_stages(run: Run, recipe: Stages) -> tuple[Stages, str]:
    """Return the stages that make the student of a run before its training, and the name of the last one.

    Runs of one seed share them, whatever their budget, rate and batch.
    """
    arm, seed = ARMS[run.arm], run.seed
    cut = f"{arm.score}_s{seed}"
    score, select, prune = (f"{kind}_{cut}" for kind in ("score", "select", "prune"))
    out: Stages = {
        score: {**recipe["score"], "method": arm.score, "seed": seed},
        select: _reading(recipe["select"], scores=score),
        prune: _reading(recipe["prune"], plan=select),
    }
    if arm.mode is None:
        return out, prune
    repair = f"compensate_{arm.mode}_{cut}"
    keys = {**recipe["compensate"], "mode": arm.mode, "seed": fitting_seed(run)}
    return {**out, repair: _reading(keys, student=prune, plan=select)}, repair


def _reading(stage: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    return {**stage, "inputs": {**stage["inputs"], **inputs}}


def training_stages(run: Run, recipe: Stages, start: str) -> Stages:
    """Return the trainings of a run, which split its budget."""
    arm, keys = ARMS[run.arm], recipe["distill"]
    batch = max(1, round(keys["global_batch_size"] * run.batch))
    steps = run.budget // (batch * keys["seq_len_tokens"])
    layer_steps = round(steps * LAYER_SHARE) if arm.layers else 0
    out: Stages = {}
    if arm.layers:
        plan = f"select_{arm.score}_s{run.seed}"
        shared = {key: value for key, value in keys.items() if key in _OPTIMIZATION}
        made = {**shared, "kind": LAYERS_KIND, **_schedule(keys, run, layer_steps), "global_batch_size": batch}
        made["seed"] = fitting_seed(run)
        out[f"layers_{run.slug}"] = {**made, "inputs": {"student": start, "plan": plan}}
        start = f"layers_{run.slug}"
    training = {**keys, **_schedule(keys, run, steps - layer_steps), "global_batch_size": batch}
    return {**out, f"distill_{run.slug}": _reading(training, student=start)}


_OPTIMIZATION = ("seq_len_tokens", "precision", "valid_num_tokens", "save_interval_steps")


def _schedule(keys: dict[str, Any], run: Run, steps: int) -> dict[str, Any]:
    """Return the keys of a training that decays to its last step, with the warmup's share and final rate as there."""
    return {
        "num_steps": steps,
        "lr": keys["lr"] * run.rate,
        "min_lr": keys["min_lr"] * run.rate,
        "warmup_steps": max(1, round(steps * keys["warmup_steps"] / keys["num_steps"])),
        "valid_interval_steps": steps,
        "seed": run.seed,
    }


def task_of(run: Run, recipe: Stages, micro_batch_size: int) -> Task:
    """Return the task of a run: its stages, what is measured, and the tokens that count."""
    made, start = start_stages(run, recipe)
    trained = training_stages(run, recipe, start)
    last = list(trained)[-1]
    measured: Stages = {}
    measures = {}
    for text, template in (("own", "evaluate"), ("other", "evaluate_other")):
        for when, model, name in (("", last, run.slug), ("start ", start, start)):
            stage = f"{text}_{name}"
            measured[stage] = _reading({**recipe[template], "label": stage}, model=model)
            measures[f"{when}{text}"] = stage
    stages = needed_stages({**recipe, **made, **trained, **measured}, list(measured))
    facts = {
        "run": asdict(run),
        "is_sweep": run.seed == SWEEP_SEED,
        "calibration_tokens": calibration_tokens(made),
        "training_tokens": sum(training_tokens(stage) for stage in trained.values()),
        "counted_stages": [*made, *trained],
    }
    batch = min(stages[name]["global_batch_size"] for name in trained)
    return Task(
        id=run.id,
        group=run.arm,
        work=run.budget,
        stages=stages,
        measures=measures,
        temporary=tuple(trained),
        micro_batch_size=min(micro_batch_size, batch),
        facts=facts,
    )


def calibration_tokens(stages: Stages) -> int:
    """Count the tokens that scoring and repair read, including the text on which damping is chosen."""
    reads = [stage for stage in stages.values() if "num_samples" in stage]
    return sum(stage["num_samples"] * stage["seq_len_tokens"] + stage.get("heldout_tokens", 0) for stage in reads)


def training_tokens(stage: dict[str, Any]) -> int:
    """Count the tokens of a training."""
    return int(stage["num_steps"] * stage["global_batch_size"] * stage["seq_len_tokens"])


def sweep(arm: str, size: Size, found: Found) -> list[Run]:
    """Return the runs of the sweep of an arm: all rates, then other batches at the best rate so far."""
    runs = [Run(arm, size.budgets[0], SWEEP_SEED, rate=rate) for rate in RATES]
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


def suite_runs(size: Size, arms: Sequence[str], found: Found) -> list[Run]:
    """Return all runs in their order: the sweeps, then the budgets, smallest first, with all arms of a seed together.

    As long as a sweep is not finished, the runs of its arm stand there with the best rate and batch so far.
    """
    sweeps = {arm: sweep(arm, size, found) for arm in arms}
    runs = [run for arm in arms for run in sweeps[arm]]
    for budget in size.budgets:
        for seed in size.seeds:
            runs += [replace(_best(sweeps[arm], found), budget=budget, seed=seed) for arm in arms]
    return runs


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
    arms = [name for name in usable_arms(STAGES) if not arguments.only or name in arguments.only]
    for name in (name for name in arguments.only or ARMS if name not in arms):
        print(f"{name} is skipped: there is no kind of stage {LAYERS_KIND}.")
    folder = run_folder(recipe)
    file = folder / "token_ratio.jsonl"

    def tasks(found: Found) -> list[Task]:
        runs = selected(suite_runs(size, arms, found), arguments.budget, arguments.seed)
        return [task_of(run, stages, micro_batch_size) for run in runs]

    def waiting(found: Found) -> list[Task]:
        return [task for task in tasks(found) if task.id not in found]

    found = read_figures(file)
    require_same_origin(found, tasks(found), file)
    if not arguments.report:
        spent_s = prepare(recipe, ("teacher", "data", "other", "judge"))
        limit_s = None if arguments.limit_minutes is None else 60 * arguments.limit_minutes - spent_s
        found = run_tasks(waiting, lambda task: run_task(task, recipe), file, limit_s=limit_s)
    publish(found, arguments.size, folder, write_docs=arguments.write_docs)


def publish(found: Found, size: str, folder: Path, *, write_docs: bool) -> None:
    """Print the results and store them in the run folder; with `write_docs` also in docs/."""
    rows = list(found.values())
    name = f"token_ratio_{size}"
    design = Design(BASELINE, SIZES[size].budgets, SIZES[size].seeds)
    text = page(rows, design, size, f"{name}.png")
    print(text)
    folders = [folder, *([ROOT / "docs"] if write_docs else [])]
    if any(not row["is_sweep"] for row in rows):
        for place in folders:
            picture(rows, place / f"{name}.png")
        picture(rows, folder / f"{name}.svg")
    (folder / f"{name}.md").write_text(text + "\n")
    if write_docs:
        begin = f"<!-- token ratio, {size}: made by `make token-ratio` -->"
        replace_part(ROOT / "docs/results.md", begin, f"<!-- end of token ratio, {size} -->", text)


if __name__ == "__main__":
    main()
