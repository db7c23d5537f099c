"""Render the pruning part of docs/results.md from the figures: tables, the papers' values and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from statistics import mean
from typing import Any

from pages import markdown_table, spread

Figures = Mapping[str, Any]
PAPER_TABLE_11 = {
    "l2,l2": 8.73,
    "l2,mean": 7.18,
    "l2,var": 8.18,
    "mean,l2": 8.41,
    "mean,mean": 7.21,
    "mean,var": 7.94,
    "var,l2": 9.01,
    "var,mean": 8.34,
    "var,var": 10.55,
}
"""Zero-shot LM loss of Nemotron-4 15B cut to 8B, on 8T data (2407.14679, table 11); keys: batch, sequence."""


def verdict(held: bool | None) -> str:
    """Words for a verdict; None means that the figures do not decide."""
    return {True: "held", False: "**did not hold**", None: "undecided: the ranges overlap"}[held]


def below(one: list[float], other: list[float]) -> bool | None:
    """Whether every value of one is below every value of the other; None when the ranges overlap."""
    if max(one) < min(other):
        return True
    return False if min(one) > max(other) else None


def aggregations(found: Figures) -> str:
    rows = sorted(found.items(), key=lambda item: mean(item[1]))
    table = markdown_table(
        ["batch, sequence", "loss", "2407.14679, table 11"],
        [[name.replace(",", ", "), spread(values), f"{PAPER_TABLE_11[name]:.2f}"] for name, values in rows],
    )
    tau = _tau([mean(found[name]) for name in PAPER_TABLE_11], list(PAPER_TABLE_11.values()))
    best = rows[0][0]
    return (
        f"{table}\n\n"
        f"- The papers choose (l2, mean), which is best or second best in their table. Here the best is ({best.replace(',', ', ')}), "
        f"and (l2, mean) is number {[name for name, _ in rows].index('l2,mean') + 1} of 9.\n"
        f"- Claim: mean over the sequence beats l2 over the sequence (batch l2): "
        f"{verdict(below(found['l2,mean'], found['l2,l2']))}.\n"
        f"- Claim: (var, var) is worst: {verdict(rows[-1][0] == 'var,var')}.\n"
        f"- Kendall's tau between this order and the paper's: {tau:.2f}."
    )


def methods(found: Figures) -> str:
    table = markdown_table(["chosen by", "loss"], [[name, spread(values)] for name, values in found.items()])
    ours = found["importance, modelopt"]
    return (
        f"{table}\n\n"
        f"- Claim: importance beats random indices (2408.11796, figure 6): {verdict(below(ours, found['random']))}.\n"
        f"- Importance against weight magnitude: {verdict(below(ours, found['magnitude']))}.\n"
        f"- The paper's formula (before the activation) against ModelOpt's (after it): the paper's is "
        f"{_compared(found['importance, paper'], ours)}.\n"
        f"- First-order Taylor, which needs a backward pass, against activations: Taylor is {_compared(found['taylor'], ours)}.\n"
        f"- One ranking for all layers (neurons and heads), as in the text of 2407.14679, against one per layer: it is "
        f"{_compared(found['importance, one order for all layers'], ours)}."
    )


def _compared(one: list[float], other: list[float]) -> str:
    return {True: "better", False: "worse", None: "not distinguishable"}[below(one, other)]


def merging(found: Figures) -> str:
    table = markdown_table(["head_merge", "loss"], [[name, spread(values)] for name, values in found.items()])
    return (
        f"{table}\n\n"
        f"- Claim: merging as printed improves on plain cutting (2407.14679, section 2.3, which gives no number): "
        f"{verdict(below(found['printed'], found['off']))}.\n"
        f"- The opposite sign against plain cutting: it is {_compared(found['opposite'], found['off'])}; "
        f"the mean: {_compared(found['mean'], found['off'])}."
    )


def rounds(found: Figures) -> str:
    table = markdown_table(["rounds", "loss", "2407.14679, table 12"], [
        [count, spread(found[count]), paper] for count, paper in (("1", "5.43"), ("2", "5.55"), ("4", "5.24"))
    ])  # fmt: skip
    return (
        f"{table}\n\n"
        f"- In the paper the number of rounds has no monotonic effect zero-shot and none after training. Here four rounds "
        f"against one: {_compared(found['4'], found['1'])}. After training: not tested here."
    )


def half_depth(found: Figures) -> str:
    rows = [
        [name, f"{row['loss']:.3f}", f"{row['accuracy']:.2f}", _ranges(row["kept"])]
        for name, row in sorted(found.items(), key=lambda item: item[1]["loss"])
    ]
    runs = {name: row for name, row in found.items() if name.endswith("contiguous")}
    singles = {name: row for name, row in found.items() if name.endswith(("individual", "iterative"))}
    best_single, best_run = (min(rows.values(), key=lambda row: row["loss"]) for rows in (singles, runs))
    by_task = found["task, contiguous"]
    return (
        markdown_table(["chosen by", "loss", "accuracy", "layers kept"], rows) + "\n\n"
        "- Claim: layers chosen individually by LM loss leave a better LM loss than a contiguous block "
        f"(2408.11796, section 4): {verdict(found['lm_loss, individual']['loss'] < found['lm_loss, contiguous']['loss'])}"
        f"; best individual choice {best_single['loss']:.3f}, best block {best_run['loss']:.3f}.\n"
        "- Claim: for accuracy the contiguous block is better: "
        f"{verdict(_accuracy_order(by_task['accuracy'], found['lm_loss, individual']['accuracy']))} "
        f"({by_task['accuracy']:.2f} against {found['lm_loss, individual']['accuracy']:.2f}; the standard error of 200 "
        "examples is 0.03).\n"
        "- Claim: LM loss is a better guide than block influence (2407.14679, table 13: 2.155 against 2.177 after "
        f"training): {verdict(found['lm_loss, individual']['loss'] < found['block_influence, individual']['loss'])}.\n"
        "- Claim: the first and the last layers matter most (2408.11796, figure 8). Kept by individual LM loss: "
        f"first {verdict(0 in found['lm_loss, individual']['kept'])}, "
        f"last {verdict(29 in found['lm_loss, individual']['kept'])}."
    )


def _accuracy_order(one: float, other: float) -> bool | None:
    return None if abs(one - other) < 0.06 else one > other


def _ranges(kept: list[int]) -> str:
    from nemo_minitron.pruning.plan_file import to_ranges

    return to_ranges(kept) if kept else ""


def _tau(one: list[float], other: list[float]) -> float:
    from nemo_minitron.pruning.search import kendall_tau

    return kendall_tau(one, other) or 0.0


CLAIMS: dict[str, tuple[str, str, Callable[[Figures], str]]] = {
    "aggregations": (
        "Aggregation of activations",
        "Hidden 576 -> 512, MLP 1536 -> 1152, heads 9 -> 6 at once.",
        aggregations,
    ),
    "methods": ("Importance against other criteria", "The same cut.", methods),
    "merging": ("Head-residual merging", "Heads 9 -> 6 (of 3 query groups), everything else kept.", merging),
    "rounds": (
        "One round or several",
        "Hidden 576 -> 448, scored anew in each round, without training between rounds.",
        rounds,
    ),
    "half_depth": (
        "Half of the layers",
        "30 -> 15. Chosen by calibration text (8 samples, 16 for block influence) or by 50 examples of arc_easy; accuracy is measured on 200 examples of openbookqa.",
        half_depth,
    ),
}
BEGIN, END = "<!-- pruning: made by `make results` -->", "<!-- end of pruning -->"
HEAD = """## Pruning: the papers' claims

Written by `make results` on {today}; `benchmarks/claims.py` derives every verdict from the figures.

SmolLM2-135M-Instruct (4-bit weights, expanded), zero-shot: pruned and measured, not trained. Losses are held-out nats per token over
8,192 tokens of benchmark passages. Figures in parentheses are the range over three draws of 16 calibration samples of 256 tokens (for
random: three seeds). The papers' models are a hundred times larger and use other text, and the ranking of pruned models before training
differs from the ranking after it (2407.14679, figure 6): this tests the code and gives a hint, no more.

"""


def render(found: Figures) -> str:
    """Render the part."""
    teacher = f"The teacher: loss {found['teacher']['loss']:.3f}, accuracy {found['teacher']['accuracy']:.2f}.\n"
    parts = [f"### {title}\n\n{what}\n\n{section(found[name])}\n" for name, (title, what, section) in CLAIMS.items()]
    return HEAD.format(today=date.today()) + teacher + "\n" + "\n".join(parts) + "\n" + TAIL


TAIL = """### Not reproduced here

- Anything after training at the papers' scale: rankings after 400 steps of 1.8B tokens (2407.14679, figures 5, 6, 9), width
  against depth after 94B tokens (table 13), few-shot accuracy.
- Winogrande with five examples, by which 2408.11796 chose its contiguous block of layers: a model of this size is at chance on it.
"""
