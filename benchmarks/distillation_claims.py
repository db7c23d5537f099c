"""Render the distillation part of docs/results.md from the figures of benchmarks/distillation.py, verdicts included."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, Literal

Found = dict[str, dict[str, Any]]
BEGIN, END = "<!-- distillation: made by `make claims` -->", "<!-- end of distillation -->"
HELD, NOT_HELD, UNDECIDED = "held", "**not held**", "undecided"


@dataclass(frozen=True)
class Claim:
    """One row of the table."""

    text: str
    paper: str
    better: str
    """Trial that the claim says has the lower loss."""
    worse: tuple[str, ...]
    says: Literal["better", "equal", "not worse"] = "better"
    """Of `better` against `worse`. not worse: the other has no gain, whether it harms or not."""


CLAIMS = (
    Claim("Distillation beats retraining on the text", "MMLU 37.8 (100B tokens) against 24.6 (150B), 2407.14679, table 14", "KD", ("CE",)),
    Claim("KD alone is at least as good as KD + CE", "loss 2.107 against 2.117 (table 15)", "KD", ("KD + CE",), "not worse"),
    Claim("Pruned beats random weights", "2.049 against 3.953 (table 1)", "KD", ("random init, KD",)),
    Claim("Pruned by importance beats pruned at random", "2408.11796, figure 6", "KD", ("random cut, KD",)),
    Claim("Forward KL beats reverse KL, width", "2.117 against 2.140, both + CE (table 15)", "KD", ("reverse_kl",)),
    Claim("... cut in depth (by more, in the paper)", "2.155 against 2.665 (table 16)", "depth, KD", ("depth, reverse_kl",)),
    Claim("Forward KL beats MSE", "2.117 against 2.144, both + CE (table 15)", "KD", ("mse",)),
    Claim("Forward KL beats cosine", "2.117 against 2.134, both + CE (table 15)", "KD", ("cosine",)),
    Claim("Forward KL beats JSD (beta 0.5)", "not in the papers", "KD", ("jsd",)),
    Claim("Temperature 1 beats 0.1, 0.5 and 3", "best of the four (A.5)", "KD", ("T 0.1", "T 0.5", "T 3")),
    Claim("Few of the teacher's logits (top 4) harm", "k up to 100 of 256,000 harms (A.5)", "KD", ("top 4, tail dropped",)),
    Claim("... top 16", "", "KD", ("top 16, tail dropped",)),
    Claim("... top 64", "", "KD", ("top 64, tail dropped",)),
    Claim("A large top-k (128) is as good as all", "no gain, no harm (A.5)", "KD", ("top 128, tail dropped",), "equal"),
    Claim("A ghost token for the tail beats dropping it (top 16)", "2503.16870", "top 16, ghost", ("top 16, tail dropped",)),
    Claim("50 draws are as good as all logits", "2.75 against 2.75 (2503.16870)", "KD", ("50 draws",), "equal"),
    Claim("Draws beat top-k (12 draws against top 16, dropped)", "2503.16870", "12 draws", ("top 16, tail dropped",)),
    Claim("Hidden states help at half depth", "2.141 against 2.155 (table 17)", "depth, KD + hidden", ("depth, KD",)),
    Claim("... and not for width", "no gain (table 18)", "KD", ("width, KD + hidden",), "not worse"),
    Claim("Width beats depth at equal parameters", "2.049 against 2.155 (table 13)", "KD", ("depth, KD",)),
    Claim("One cut is as good as two with new scores", "1.92 each (table 12)", "KD", ("two rounds",), "not worse"),
    Claim(
        "On other text a corrected teacher is better",
        "held-out loss over 6 % lower (2408.11796, figure 4)",
        "other text, corrected teacher",
        ("other text, teacher as it is",),
    ),
)  # fmt: skip


def by_seed(found: Found, name: str) -> dict[int, float]:
    """Held-out loss of each seed."""
    trials = [entry for entry in found.values() if entry["trial"]["name"] == name]
    return {entry["trial"]["seed"]: entry["final"]["valid_loss"] for entry in trials}


def losses_of(found: Found, name: str) -> list[float]:
    """Held-out losses in the order of the seeds."""
    return [loss for _, loss in sorted(by_seed(found, name).items())]


def gaps_of(found: Found, better: str, worse: str) -> list[float]:
    """worse - better for every seed that both have: the same text in the same order."""
    a, b = by_seed(found, better), by_seed(found, worse)
    return [b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]


def sign_of(gaps: list[float]) -> int:
    """1 or -1 where all seeds agree and the mean is larger than their range; 0: within the seeds' range."""
    spread_of_seeds = max(gaps) - min(gaps)
    if min(gaps) * max(gaps) <= 0 or abs(mean(gaps)) <= spread_of_seeds:
        return 0
    return 1 if gaps[0] > 0 else -1


def verdict(found: Found, claim: Claim) -> str:
    """Worked out from the seeds; with fewer than two of them nothing is said."""
    gaps = [gaps_of(found, claim.better, worse) for worse in claim.worse]
    if any(len(values) < 2 for values in gaps):
        return "not run"
    signs = [sign_of(values) for values in gaps]
    if claim.says == "equal":
        return NOT_HELD if any(signs) else HELD
    if -1 in signs:
        return NOT_HELD
    return HELD if claim.says == "not worse" or all(signs) else UNDECIDED


def spread(values: list[float]) -> str:
    """Mean, and half of the range."""
    if not values:
        return "(not run)"
    return f"{mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def table(found: Found) -> str:
    """Markdown."""
    rows = ["| claim | the paper | ours: held-out loss, mean ± half range | verdict |", "|---|---|---|---|"]
    for claim in CLAIMS:
        others = ", ".join(f"{name} {spread(losses_of(found, name))}" for name in claim.worse)
        ours = f"{claim.better} {spread(losses_of(found, claim.better))}; {others}"
        rows.append(f"| {claim.text} | {claim.paper} | {ours} | {verdict(found, claim)} |")
    return "\n".join(rows)


def curve_of(found: Found, name: str) -> list[tuple[int, float]]:
    """(tokens, held-out loss), the mean over the seeds."""
    curves = [entry["curve"] for entry in found.values() if entry["trial"]["name"] == name]
    if not curves:
        return []
    return [(rows[0]["tokens"], mean(row["valid_loss"] for row in rows)) for rows in zip(*curves, strict=True)]


def tokens_to_reach(curve: list[tuple[int, float]], loss: float) -> float | None:
    """Where the curve first falls to the loss, between its points on straight lines; None: never."""
    if curve[0][1] <= loss:
        return float(curve[0][0])
    for (tokens_a, loss_a), (tokens_b, loss_b) in pairwise(curve):
        if loss_b <= loss:
            return tokens_a + (tokens_b - tokens_a) * (loss_a - loss) / (loss_a - loss_b)
    return None


def headline(found: Found) -> str:
    """Tokens from scratch over tokens pruned and distilled, for the losses that the latter has on its way."""
    scratch, pruned = curve_of(found, "from scratch, CE"), curve_of(found, "KD")
    if not scratch or not pruned:
        return "The comparison with training from scratch was not run."
    last_loss, most = scratch[-1][1], scratch[-1][0]
    rows = ["| held-out loss | pruned + distilled, tokens | from scratch, tokens | ratio |", "|---|---|---|---|"]
    for share in (0.25, 0.5, 1.0):
        tokens, loss = pruned[max(1, round(share * (len(pruned) - 1)))]
        needed = tokens_to_reach(scratch, loss)
        there = (
            f"{needed:,.0f} | **{needed / tokens:.1f}x**"
            if needed
            else f"more than {most:,} | **over {most / tokens:.1f}x**"
        )
        rows.append(f"| {loss:.3f} | {tokens:,} | {there} |")
    budget, reached = pruned[-1]
    sentence = (
        f"Pruned and distilled, the student reaches {reached:.3f} after {budget:,} tokens. "
        f"The same shape from random weights, trained on the text alone, {_needed(scratch, reached, budget)} "
        f"After {most:,} tokens that model reaches {last_loss:.3f}; {_shortcut(tokens_to_reach(pruned, last_loss), most)} "
        "The paper reports up to 40x (2407.14679). As there, the tokens that the teacher was trained on are not counted. "
        "Because the learning rate decays until the end of a training, losses at the end look better than losses in the "
        "middle. Each row compares the distilled student with a point partway through the from-scratch training; the "
        "upper rows use even earlier points."
    )
    return f"{sentence}\n\n" + "\n".join(rows)


def _needed(scratch: list[tuple[int, float]], loss: float, budget: int) -> str:
    tokens = tokens_to_reach(scratch, loss)
    if tokens is None:
        return f"does not reach it in {scratch[-1][0]:,}: **over {scratch[-1][0] / budget:.1f}x** as many."
    return f"reaches it after {tokens:,.0f}: **{tokens / budget:.1f}x** as many."


def _shortcut(tokens: float | None, most: int) -> str:
    """Where the distilled student has what training from scratch ends with."""
    if tokens is None:
        return "the distilled student does not get that low within its budget."
    if tokens == 0:
        return "the pruned model is below that before any training."
    return f"the distilled student reaches that after {tokens:,.0f}: **{most / tokens:.0f}x fewer**."


def picture(found: Found, file: Path) -> None:
    """Held-out loss over tokens, from scratch and pruned."""
    from pictures import finish, pyplot

    plt = pyplot()
    named = {
        "from scratch, CE": ("from scratch, next-token", "#b5651d"),
        "random init, KD": ("from scratch, distilled", "#d9a441"),
        "CE": ("pruned, next-token", "#7a8fa6"),
        "KD": ("pruned, distilled", "#1f6f5c"),
    }
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    for name, (label, color) in named.items():
        curves = [entry["curve"] for entry in found.values() if entry["trial"]["name"] == name]
        if not curves:
            continue
        points = [(rows[0]["tokens"], [row["valid_loss"] for row in rows]) for rows in zip(*curves, strict=True)][1:]
        tokens = [point[0] for point in points]
        axes.plot(tokens, [mean(point[1]) for point in points], label=label, color=color, linewidth=1.8)
        low, high = [min(point[1]) for point in points], [max(point[1]) for point in points]
        axes.fill_between(tokens, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="training tokens", ylabel="held-out loss, nats per token")
    axes.legend(frameon=False)
    finish(figure, file)


def bars(found: Found, file: Path) -> None:
    """How much worse than the reference every variant is, with each seed as a dot."""
    from pictures import pyplot

    plt, skip = pyplot(), ("KD", "from scratch, CE", "random init, KD")
    trials = sorted({entry["trial"]["name"] for entry in found.values()})
    names = [name for name in trials if name not in skip and not name.startswith("other text")]
    gaps = {}
    for name in names:
        same_cut = "depth, KD" if name.startswith("depth, ") and name != "depth, KD" else "KD"
        gaps[name] = gaps_of(found, same_cut, name)
    ordered = sorted((name for name in gaps if gaps[name]), key=lambda name: mean(gaps[name]))
    figure, axes = plt.subplots(figsize=(7.2, 0.27 * len(ordered) + 1.0))
    for row, name in enumerate(ordered):
        axes.barh(row, mean(gaps[name]), color="#1f6f5c" if mean(gaps[name]) <= 0 else "#b5651d", alpha=0.6, height=0.6)
        axes.plot(gaps[name], [row] * len(gaps[name]), "o", color="#333333", ms=3)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_xlabel("held-out loss above KD (depth, ...: above depth, KD); dots: seeds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=150, facecolor="white")
    plt.close(figure)


def teacher_facts(run: Path) -> dict[str, Any]:
    """From the manifests of the run."""

    def result(stage: str) -> dict[str, Any]:
        return dict(json.loads((run / stage / "manifest.json").read_text())["result"])

    return {name: result(name) for name in ("teacher", "width", "depth", "corrected")}


def _origin(teacher: dict[str, Any]) -> str:
    """What the teacher is; one that was imported has no training to tell of."""
    if "tokens" not in teacher:
        return f"The teacher has {teacher['num_params']:,} parameters ({teacher['source']})."
    return (
        f"The teacher is a Llama of {teacher['num_params']:,} parameters, trained here from scratch on "
        f"{teacher['tokens']:,} tokens (held-out loss {teacher['final_valid_loss']:.3f})."
    )


def section(found: Found, run: Path, size: str) -> str:
    """The whole part."""
    facts, one = teacher_facts(run), next(entry for entry in found.values() if entry["trial"]["name"] == "KD")
    corrected = facts["corrected"]
    lower = 1 - corrected["final_valid_loss"] / corrected["initial_valid_loss"]
    return f"""## Distillation: the papers' claims

Written by `make claims` (size {size}) on {date.today()}. {_origin(facts["teacher"])} The students have {facts["width"]["num_params"]:,}
parameters by width, {facts["depth"]["num_params"]:,} by depth (half of the layers); {one["curve"][-1]["tokens"]:,} tokens each. Losses are nats per
token of held-out documents; {len(by_seed(found, "KD"))} seeds (order of the text; random weights and cuts). Variants are compared seed by
seed. A difference counts if all seeds agree and its mean is larger than its range over the seeds; otherwise the claim is
*undecided* (or *held*, if it states that there is no difference or no gain). The papers' students have 4 to 8 billion
parameters and see about 100 billion tokens.

### Tokens to a given loss

{headline(found)}

![Held-out loss over tokens](claims_tokens.png)

### Claims

{table(found)}

Teacher correction lowered the teacher's own held-out loss on the other text by {lower:.1%}.

![Distance of every variant from plain distillation](claims_variants.png)
"""


def write_page(found: Found, run: Path, docs: Path, size: str) -> None:
    """Replace the part between the marks in results.md, or add it at the end; draw the pictures."""
    from pages import replace_part

    replace_part(docs / "results.md", BEGIN, END, section(found, run, size))
    draw: dict[str, Callable[[Found, Path], None]] = {"claims_tokens.png": picture, "claims_variants.png": bars}
    for name, function in draw.items():
        function(found, docs / name)
