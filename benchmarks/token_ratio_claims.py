"""Render the results of the token-ratio suite: tables, verdicts, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

from pages import markdown_table, spread
from token_ratio_rule import (
    NO_VERDICT,
    NOT_RUN,
    Point,
    Value,
    at_least,
    does_not_fall,
    fit,
    on_both,
    ratio_at_arm,
    ratio_at_baseline,
)

Row = Mapping[str, Any]
TEXTS = {"own": "training text, held out", "other": "another kind of text"}
TOKENS_GOAL, WALL_GOAL, SCRATCH_GOAL = 2.0, 1.5, 30.0
SCRATCH, SCRATCH_AGAINST = "from_scratch", "compensated"
"""Arm with random weights, and the arm whose smallest budget it is compared with."""


@dataclass(frozen=True)
class Design:
    """What the rule requires before there is a verdict."""

    baseline: str
    """Arm that the others are compared with."""
    budgets: tuple[int, ...]
    """Training tokens, ascending."""
    seeds: tuple[int, ...]
    scratch_budgets: tuple[int, ...] = ()
    """Training tokens of the model from scratch, ascending."""


def counted(rows: Sequence[Row]) -> list[Row]:
    """Return the runs that count: all except those of the sweep."""
    return [row for row in rows if not row["is_sweep"]]


def arms_of(rows: Sequence[Row]) -> list[str]:
    """Return the arms in the order in which they were run first."""
    return list(dict.fromkeys(row["run"]["arm"] for row in counted(rows)))


def compared_arms(rows: Sequence[Row], baseline: str) -> list[str]:
    """Return the arms that are compared with the baseline."""
    return [arm for arm in arms_of(rows) if arm not in (baseline, SCRATCH)]


def tokens_of(row: Row) -> float:
    """Return the tokens that count: training, layer-local training, scoring and repair."""
    return float(row["training_tokens"] + row["calibration_tokens"])


def loss_of(row: Row, text: str) -> float:
    """Return the held-out loss in nats per token."""
    return float(row["figures"][text]["loss_nats_per_token"])


def wall_of(row: Row, interrupted: frozenset[str]) -> float | None:
    """Return the seconds of all stages that count; None: one of them was interrupted and only partly measured."""
    if interrupted & set(row["counted_stages"]):
        return None
    return float(sum(row["wall_s"][stage] for stage in row["counted_stages"]))


def interrupted_stages(rows: Sequence[Row]) -> frozenset[str]:
    """Return all stages that were interrupted in some run."""
    return frozenset(stage for row in rows for stage in row["resumed"])


def beside_other_work(rows: Sequence[Row]) -> bool:
    """Return whether the machine did other work during a run that counts, so that its seconds prove nothing."""
    return any(row.get("shared_machine", False) for row in counted(rows))


def curves_of(
    rows: Sequence[Row], arm: str, text: str, x_of: Callable[[Row], float | None] = tokens_of
) -> dict[int, dict[int, Point]]:
    """Return seed -> curve of end points, without those that have no x."""
    mine = [row for row in counted(rows) if row["run"]["arm"] == arm]
    out: dict[int, dict[int, Point]] = {}
    for row in sorted(mine, key=lambda row: (row["run"]["seed"], row["run"]["budget"])):
        x = x_of(row)
        if x is not None:
            out.setdefault(row["run"]["seed"], {})[row["run"]["budget"]] = (x, loss_of(row, text))
    return out


def complete_ratios(
    rows: Sequence[Row], design: Design, arm: str, text: str, x_of: Callable[[Row], float | None] = tokens_of
) -> dict[int, list[Value]]:
    """Return budget -> ratios at the losses of the baseline, one for each seed; empty as long as runs are missing."""
    base, mine = (curves_of(rows, name, text, x_of) for name in (design.baseline, arm))
    all_budgets = list(design.budgets)
    if any(list(curves.get(seed, ())) != all_budgets for curves in (base, mine) for seed in design.seeds):
        return {}
    return {
        budget: [ratio_at_baseline(base[seed], mine[seed], budget) for seed in design.seeds] for budget in all_budgets
    }


def in_range(values: Sequence[Value]) -> str:
    """Format the range over the seeds."""
    if not values:
        return "-"
    low, high = min(values, key=lambda value: value.number), max(values, key=lambda value: value.number)
    return str(low) if str(low) == str(high) else f"{low} to {high}"


def loss_table(rows: Sequence[Row]) -> str:
    """Format losses, tokens and seconds of each arm and budget."""
    interrupted, body = interrupted_stages(rows), []
    keys = dict.fromkeys((row["run"]["arm"], row["run"]["budget"]) for row in counted(rows))
    for arm, budget in sorted(keys, key=lambda key: (arms_of(rows).index(key[0]), key[1])):
        mine = [row for row in counted(rows) if (row["run"]["arm"], row["run"]["budget"]) == (arm, budget)]
        mine.sort(key=lambda row: row["run"]["seed"])
        walls = [wall for row in mine if (wall := wall_of(row, interrupted)) is not None]
        by_text = [cell for text in TEXTS for cell in (_losses(mine, text), _losses(mine, f"start {text}"))]
        run = mine[0]["run"]
        settings = f"{run['rate']:.3g}, {run['batch']:g}"
        tokens, seconds = f"{tokens_of(mine[0]):,.0f}", spread(walls, 0) if walls else "-"
        body.append([arm, f"{budget:,}", tokens, settings, *by_text, seconds])
    head = ["arm", "budget", "tokens counted", "rate, batch (factors)"]
    head += [cell for text in TEXTS.values() for cell in (f"{text}: by seed", "untrained")]
    return markdown_table([*head, "seconds"], body)


def _losses(rows: Sequence[Row], text: str) -> str:
    return ", ".join(f"{loss_of(row, text):.3f}" for row in rows)


def ratio_table(rows: Sequence[Row], design: Design) -> str:
    """Format the token ratios of each arm, at the losses of the baseline and at its own."""
    body = []
    for arm in compared_arms(rows, design.baseline):
        for text, name in TEXTS.items():
            base, mine = curves_of(rows, design.baseline, text), curves_of(rows, arm, text)
            pairs = [(base[seed], mine[seed]) for seed in sorted(base.keys() & mine.keys())]
            for budget in design.budgets:
                there = [ratio_at_baseline(*pair, budget) for pair in pairs if budget in pair[0]]
                own = [ratio_at_arm(*pair, budget) for pair in pairs if budget in pair[1]]
                body.append([arm, name, f"{budget:,}", in_range(there), in_range(own)])
    head = ["arm", "text", "budget", "ratio at the sliced arm's loss", "ratio at this arm's loss"]
    return markdown_table(head, body)


def claim_table(rows: Sequence[Row], design: Design) -> str:
    """Format the verdicts of each arm."""
    interrupted, last = interrupted_stages(rows), design.budgets[-1]
    judge_of_times = _no_verdict if beside_other_work(rows) else _reaches(WALL_GOAL, last)
    body = []
    for arm in compared_arms(rows, design.baseline):
        tokens = {text: complete_ratios(rows, design, arm, text) for text in TEXTS}
        walls = {
            text: complete_ratios(rows, design, arm, text, lambda row: wall_of(row, interrupted)) for text in TEXTS
        }
        body += [
            _claim(arm, f"at least {TOKENS_GOAL:g}x fewer tokens", tokens, last, _reaches(TOKENS_GOAL, last)),
            _claim(arm, "the token ratio does not fall with the budget", tokens, last, _trend),
            _claim(arm, f"at least {WALL_GOAL:g}x less wall time", walls, last, judge_of_times),
        ]
    head = ["arm", "claim, at the largest budget"]
    head += [cell for text in TEXTS.values() for cell in (text, "verdict")]
    return markdown_table([*head, "both texts"], body)


Verdict = Callable[[Mapping[int, list[Value]]], str]


def _reaches(goal: float, budget: int) -> Verdict:
    return lambda found: at_least(found[budget], goal)


def _no_verdict(_: Mapping[int, list[Value]]) -> str:
    return NO_VERDICT


def _trend(found: Mapping[int, list[Value]]) -> str:
    if len(found) < 2:
        return NOT_RUN
    middle, largest = list(found.values())[-2:]
    return does_not_fall(middle, largest)


def _claim(
    arm: str, claim: str, found: Mapping[str, Mapping[int, list[Value]]], last: int, judge: Verdict
) -> list[str]:
    verdicts = [judge(found[text]) if found[text] else NOT_RUN for text in TEXTS]
    values = [in_range(found[text].get(last, [])) for text in TEXTS]
    cells = [cell for pair in zip(values, verdicts, strict=True) for cell in pair]
    return [arm, claim, *cells, on_both(verdicts)]


def scratch_table(rows: Sequence[Row], design: Design) -> str:
    """Compare the model from scratch with the repaired student at the smallest budget."""
    body, budget = [], design.budgets[0]
    for text, name in TEXTS.items():
        scratch, ours = curves_of(rows, SCRATCH, text), curves_of(rows, SCRATCH_AGAINST, text)
        seeds = [seed for seed in design.seeds if budget in ours.get(seed, ()) and seed in scratch]
        ratios = [ratio_at_arm(scratch[seed], ours[seed], budget) for seed in seeds]
        ends = [list(scratch[seed].values())[-1] for seed in seeds]
        is_complete = [tuple(scratch[seed]) for seed in seeds] == [design.scratch_budgets] * len(design.seeds)
        verdict = at_least(ratios, SCRATCH_GOAL) if is_complete else NOT_RUN
        mine = ", ".join(f"{ours[seed][budget][1]:.3f}" for seed in seeds)
        theirs = ", ".join(f"{loss:.3f}" for _, loss in ends)
        body.append([name, mine, theirs, in_range(ratios), verdict])
    if not any(row["run"]["arm"] == SCRATCH for row in counted(rows)):
        return "The model from scratch was not run."
    head = ["text", f"{SCRATCH_AGAINST}, smallest budget", "from scratch, largest budget", "ratio of tokens"]
    return markdown_table([*head, f"at least {SCRATCH_GOAL:g}x"], body)


def fit_table(rows: Sequence[Row], baseline: str) -> str:
    """Format the fits of all arms that have three budgets; the points are means over the seeds."""
    body = []
    for arm in compared_arms(rows, baseline):
        for text, name in TEXTS.items():
            found = fit(_mean_points(rows, baseline, text), _mean_points(rows, arm, text))
            if found is not None:
                shared = [f"{found.l_inf:.3f}", f"{found.beta:.2f}", f"{found.residual:.4f}"]
                body.append([arm, name, f"{found.d0_tokens:,.0f}", *shared])
    if not body:
        return "The fit needs three budgets of the sliced and of another arm."
    return markdown_table(["arm", "text", "D0, training tokens", "L_inf", "beta", "residual, nats"], body)


def _mean_points(rows: Sequence[Row], arm: str, text: str) -> list[Point]:
    """Return (training tokens, mean loss over the seeds), by budget."""
    by_budget: dict[float, list[float]] = {}
    for row in counted(rows):
        if row["run"]["arm"] == arm:
            by_budget.setdefault(float(row["run"]["budget"]), []).append(loss_of(row, text))
    return [(budget, mean(losses)) for budget, losses in sorted(by_budget.items())]


def sweep_table(rows: Sequence[Row]) -> str:
    """Format the sweep of rates and batches."""
    tried = [row for row in rows if row["is_sweep"]]
    body = [
        [row["run"]["arm"], f"{row['run']['rate']:.3g}", f"{row['run']['batch']:g}"]
        + [f"{loss_of(row, text):.3f}" for text in TEXTS]
        for row in tried
    ]
    return markdown_table(["arm", "rate, factor", "batch, factor", *TEXTS.values()], body)


def page(rows: Sequence[Row], design: Design, size: str, image: str) -> str:
    """Render the results of one size as Markdown."""
    seeds = sorted({row["run"]["seed"] for row in counted(rows)})
    busy = "\nOther work ran on the machine, so times have no verdict." if beside_other_work(rows) else ""
    image = f"![Held-out loss over tokens]({image})\n\n" if counted(rows) else ""
    return f"""## Token ratio, {size}

Written by `make token-ratio` on {date.today()}, by the [rule](explanation/token-ratio.md) that was fixed before
the runs. Losses are nats per token of held-out text; {len(seeds)} seeds. A ratio above 1 means that the arm needs
fewer tokens (or less time) than the sliced arm. ≥ and ≤ are bounds where a curve ends. Ranges are over the seeds.{busy}

### Claims

{claim_table(rows, design)}

{image}### Token ratios

{ratio_table(rows, design)}

### End points

{loss_table(rows)}

### From scratch against pruned, repaired and distilled

{scratch_table(rows, design)}

### Credit in tokens

{fit_table(rows, design.baseline)}

### Sweep of rates and batches (smallest budget, a seed of its own)

{sweep_table(rows)}"""


COLORS = ("#1f6f5c", "#d9a441", "#7a8fa6", "#b5651d", "#6a4c93", "#2b2b2b")


def picture(rows: Sequence[Row], file: Path) -> None:
    """Draw the held-out loss of each arm over the tokens that count, on both texts."""
    from matplotlib.ticker import NullFormatter
    from pictures import finish, pyplot

    plt = pyplot()
    ticks = sorted({row["run"]["budget"] for row in counted(rows) if row["run"]["arm"] != SCRATCH})
    figure, panels = plt.subplots(1, len(TEXTS), figsize=(9.6, 3.8))
    for axes, (text, name) in zip(panels, TEXTS.items(), strict=True):
        for arm, color in zip(arms_of(rows), cycle(COLORS), strict=False):
            curves = curves_of(rows, arm, text).values()
            budgets = sorted({budget for curve in curves for budget in curve})
            ends = ([curve[budget] for curve in curves if budget in curve] for budget in budgets)
            points = [list(zip(*of_seeds, strict=True)) for of_seeds in ends]
            tokens = [mean(xs) for xs, _ in points]
            axes.plot(tokens, [mean(losses) for _, losses in points], "o-", ms=4, label=arm, color=color, linewidth=1.8)
            low, high = [min(losses) for _, losses in points], [max(losses) for _, losses in points]
            axes.fill_between(tokens, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set(xscale="log", xlabel="tokens", ylabel="held-out loss, nats per token", title=name)
        axes.set_xticks(ticks, [f"{tick / 1e6:.2g}M" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(frameon=False)
    finish(figure, file)
