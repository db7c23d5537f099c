"""`make one-shot-table`: pruned students without training, sliced or repaired in several ways, on two kinds of text.

Students of SmolLM2-135M: each part of the model is cut, by each method, with calibration text of three sizes and two
kinds and three draws. Settings with little calibration text come first. Finished settings are skipped, so a stopped
suite continues with the same command. Sizes: smollm2 (two CPU cores), toy (the teacher of the token-ratio suite), smoke
(tests that the suite runs).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import token_ratio
from pages import markdown_table, replace_part, spread
from suite import (
    ROOT,
    Found,
    Stages,
    Task,
    add_published,
    explicit_stages,
    matching_figures,
    needed_stages,
    prepare,
    publish_figures,
    run_folder,
    run_task,
    run_tasks,
)
from token_ratio_claims import loss_of

TEXTS = {"data": "training text", "mixture": "mixture"}
"""Calibration text, by stage."""
Target = dict[str, int]


@dataclass(frozen=True)
class Size:
    """Sizes of the students and of the calibration text for one teacher."""

    recipe: str
    parts: Mapping[str, Target]
    """What is cut -> sizes of the student."""
    tokens: tuple[int, ...]
    """Calibration tokens."""
    draws: tuple[int, ...] = (1, 2, 3)
    """Seeds of the draw of the calibration text."""
    overrides: tuple[str, ...] = ()


SIZES = {
    "smollm2": Size(
        "token_ratio_smollm2",
        {
            "mlp": {"ffn_hidden_size": 752},
            "heads": {"num_attention_heads": 6},
            "hidden": {"hidden_size": 448},
            "width": {"hidden_size": 448, "ffn_hidden_size": 960},
            "depth": {"num_layers": 15},
        },
        (32_768, 131_072, 524_288),
        # bf16 takes half the time of fp32; docs/results.md says by how much losses change.
        overrides=("name=claims/one_shot_smollm2", "stages.compensate.precision=bf16"),
    ),
    "toy": Size(
        "token_ratio_toy",
        {
            "mlp": {"ffn_hidden_size": 224},
            "heads": {"num_attention_heads": 3},
            "hidden": {"hidden_size": 120},
            "width": {"hidden_size": 120, "ffn_hidden_size": 256},
            "depth": {"num_layers": 4},
        },
        (32_768, 131_072, 524_288),
        overrides=("name=claims/one_shot_toy",),
    ),
    "smoke": Size(
        "token_ratio_toy",
        {"mlp": {"ffn_hidden_size": 224}, "depth": {"num_layers": 4}},
        (8_192,),
        (1,),
        overrides=(
            *token_ratio.SIZES["smoke"].overrides,
            "name=claims/one_shot_smoke",
            "stages.mixture.sources.0.max_documents=500",
        ),
    ),
}
METHODS = {
    "least squares": {"kind": "score"},
    "greedy": {"kind": "score_reconstruction", "method": "greedy"},
    "OBS + swaps": {"kind": "score_reconstruction", "method": "obs"},
}
"""How the indices are chosen -> keys of the scoring stage that differ; `slice` chooses as `least squares` does."""
MODES = ("one_shot", "sequential")
AXES = {"ffn_hidden_size": "ffn", "num_attention_heads": "heads", "hidden_size": "hidden"}


@dataclass(frozen=True)
class Case:
    """One student."""

    part: str
    method: str
    mode: str | None
    """`mode` of the compensate stage. None: the student is only sliced."""
    tokens: int
    text: str
    draw: int

    @property
    def id(self) -> str:
        how = self.method if self.mode is None else f"{self.method} {self.mode}"
        return f"{self.part}, {how}, {self.tokens:,} tokens of {TEXTS[self.text]}, draw {self.draw}"


def cases(size: Size) -> Iterator[Case]:
    """Yield all students, those with little calibration text first; students that share a cut are neighbors.

    Layers are chosen by block influence only, so depth has no greedy and no OBS.
    """
    for tokens in size.tokens:
        for draw in size.draws:
            for text in TEXTS:
                for part in size.parts:
                    yield Case(part, "slice", None, tokens, text, draw)
                    for method in METHODS if part != "depth" else ("least squares",):
                        for mode in MODES:
                            yield Case(part, method, mode, tokens, text, draw)


def task_of(case: Case, recipe: Stages, target: Target) -> Task:
    """Return the task of a student: its stages and what is measured."""
    method = "least squares" if case.mode is None else case.method
    draw = f"{case.text}_{case.tokens}_s{case.draw}"
    by = METHODS[method].get("method", "importance")
    # Importance is measured once for all parts; the other rankings are made for the sizes of one part.
    score = f"score_{by}_{draw}" if by == "importance" else f"score_{by}_{case.part}_{draw}"
    select, prune = (f"{kind}_{by}_{case.part}_{draw}" for kind in ("select", "prune"))
    made: Stages = {
        score: _scoring(case, method, recipe, target),
        select: {
            **recipe["select"],
            "target": target,
            "inputs": {**recipe["select"]["inputs"], "scores": score},
        },
        prune: {**recipe["prune"], "inputs": {**recipe["prune"]["inputs"], "plan": select}},
    }
    last = prune
    if case.mode is not None:
        last = f"compensate_{case.mode}_{by}_{case.part}_{draw}"
        keys = recipe["compensate"]
        inputs = {**keys["inputs"], "student": prune, "plan": select, "data": case.text}
        made[last] = {**keys, **_draw(case, keys["seq_len_tokens"]), "mode": case.mode, "inputs": inputs}
    measures = {"own": f"{last}_on_{case.text}", "other": f"{last}_on_other"}
    measured: Stages = {
        stage: {**recipe["evaluate"], "label": stage, "inputs": {"model": last, "data": text}}
        for stage, text in zip(measures.values(), (case.text, "other"), strict=True)
    }
    stages = needed_stages({**recipe, **made, **measured}, list(measured))
    return Task(
        id=case.id,
        group=f"{method} {case.mode}",
        work=case.tokens,
        stages=stages,
        measures=measures,
        temporary=tuple(name for name in (prune, last) if name != score),
        facts={"case": asdict(case)},
    )


def _draw(case: Case, seq_len_tokens: int) -> dict[str, int]:
    return {"num_samples": case.tokens // seq_len_tokens, "seq_len_tokens": seq_len_tokens, "seed": case.draw}


def _scoring(case: Case, method: str, recipe: Stages, target: Target) -> dict[str, Any]:
    keys = recipe["score"]
    inputs = {**keys["inputs"], "data": case.text}
    if METHODS[method]["kind"] == "score":
        return {**keys, **_draw(case, keys["seq_len_tokens"]), "layer_metrics": ["block_influence"], "inputs": inputs}
    axes = [AXES[key] for key in target]
    swaps = {"swap_to": target} if METHODS[method]["method"] == "obs" else {}
    same = {**_draw(case, keys["seq_len_tokens"]), "precision": recipe["compensate"]["precision"], "inputs": inputs}
    return {**METHODS[method], **same, "width_axes": axes, **swaps}


def teacher_task(recipe: Stages, work: float) -> Task:
    """Return the task that measures the teacher on all texts.

    Args:
        work: that of the smallest setting, so that the first estimates are of the right size.
    """
    measures = {text: f"teacher_on_{text}" for text in (*TEXTS, "other")}
    measured: Stages = {
        stage: {**recipe["evaluate"], "label": stage, "inputs": {"model": "teacher", "data": text}}
        for text, stage in measures.items()
    }
    stages = needed_stages({**recipe, **measured}, list(measured))
    return Task("teacher", "teacher", work, stages, measures)


def page(rows: Sequence[dict[str, Any]], size: Size, name: str) -> str:
    """Render the table as Markdown, one section for each part."""
    found = {row["id"]: row for row in rows}
    teacher = found.get("teacher")
    losses = [] if teacher is None else [f"{text} {loss_of(teacher, text):.3f}" for text in (*TEXTS, "other")]
    every = list(cases(size))
    measured = {case.part for case in every if case.id in found}
    count = sum(case.id in found for case in every)
    sections = [
        f"### {part}: {_sizes(size.parts[part])}\n\n"
        + (_part_table(part, found, size) if part in measured else "Not measured yet.")
        for part in size.parts
    ]
    return "\n\n".join([
        f"## Pruned and repaired without training, {name}",
        f"Written by `make one-shot-table` on {date.today()}. Losses are held-out nats per token, mean and range over "
        f"up to {len(size.draws)} draws of the calibration text: `own` on the held-out part of the calibration text, "
        "`other` on text of another kind. Won back: share of the loss gap between the sliced student and the teacher. "
        f"{count} of {len(every)} settings have been measured.",
        f"Teacher: {', '.join(losses) or 'not measured yet'}.",
        *sections,
    ])  # fmt: skip


def _sizes(target: Target) -> str:
    return ", ".join(f"{key} {value}" for key, value in target.items())


def _part_table(part: str, found: Found, size: Size) -> str:
    groups: dict[tuple[int, str, str, str | None], list[Case]] = {}
    for case in cases(size):
        # Groups of unmeasured cases stay empty, so that rows have the order of the cases whatever was measured first.
        some = groups.setdefault((case.tokens, case.text, case.method, case.mode), [])
        if case.part == part and case.id in found:
            some.append(case)
    body = []
    for (tokens, text, method, mode), some in ((key, some) for key, some in groups.items() if some):
        row = [f"{tokens:,}", TEXTS[text], method, (mode or "-").replace("_", "-")]
        for measured in ("own", "other"):
            row.append(spread([loss_of(found[case.id], measured) for case in some]))
            row.append(_won_back(some, measured, found))
        body.append([*row, str(len(some))])
    head = ["calibration tokens", "calibration text", "method", "repair"]
    return markdown_table([*head, "own", "won back", "other", "won back", "draws"], body)


def _won_back(some: Sequence[Case], measured: str, found: Found) -> str:
    """Format the mean share of the gap to the teacher that the repair closes, against slicing with the same draw."""
    shares = []
    for case in some:
        sliced = found.get(Case(case.part, "slice", None, case.tokens, case.text, case.draw).id)
        if case.mode is None or sliced is None or "teacher" not in found:
            return "-"
        teacher = loss_of(found["teacher"], case.text if measured == "own" else "other")
        gap = loss_of(sliced, measured) - teacher
        shares.append((loss_of(sliced, measured) - loss_of(found[case.id], measured)) / gap)
    return f"{sum(shares) / len(shares):.0%}"


def arguments_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="smollm2")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of models and figures")
    parts = SIZES["smollm2"].parts
    parser.add_argument("--part", action="append", default=[], choices=parts, help="what is cut; can be repeated")
    parser.add_argument("--method", action="append", default=[], choices=("slice", *METHODS), help="can be repeated")
    parser.add_argument(
        "--mode", action="append", default=[], choices=MODES, help="how students are repaired; can be repeated"
    )
    parser.add_argument("--tokens", action="append", default=[], type=int, help="calibration tokens; can be repeated")
    parser.add_argument("--draw", action="append", default=[], type=int, help="can be repeated")
    parser.add_argument("--limit-minutes", type=float, help="stop before a setting that would end later")
    parser.add_argument("--with-published", action="store_true", help="skip the settings whose figures docs/ has")
    parser.add_argument("--report", action="store_true", help="run nothing; print what is measured so far")
    parser.add_argument("--write-docs", action="store_true", help="also write the table into docs/results.md")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the recipe")
    return parser.parse_intermixed_args(arguments)


def wanted(case: Case, arguments: argparse.Namespace) -> bool:
    """Return whether the command line asks for a student. Sliced ones have no mode and are always compared."""
    if case.mode is not None and arguments.mode and case.mode not in arguments.mode:
        return False
    filters = ("part", "method", "tokens", "draw")
    return all(not getattr(arguments, name) or getattr(case, name) in getattr(arguments, name) for name in filters)


def main() -> None:
    from nemo_minitron import api

    arguments = arguments_of()
    size = SIZES[arguments.size]
    overrides = [f"execution.run_root={arguments.root}", *size.overrides, *arguments.overrides]
    recipe = api.load_recipe(token_ratio.RECIPES / f"{size.recipe}.yaml", overrides)
    stages = explicit_stages(recipe)
    tasks = [task_of(case, stages, size.parts[case.part]) for case in cases(size)]
    tasks.insert(0, teacher_task(stages, size.tokens[0]))
    asked = {"teacher", *(case.id for case in cases(size) if wanted(case, arguments))}
    folder = run_folder(recipe)
    file = folder / "one_shot_table.jsonl"
    name = f"one_shot_{arguments.size}"
    if arguments.with_published:
        add_published(file, name, lambda _: tasks)
    found = matching_figures(file, lambda _: tasks)

    def waiting(found: Found) -> list[Task]:
        return [task for task in tasks if task.id in asked and task.id not in found]

    if not arguments.report:
        spent_s = prepare(recipe, ("teacher", *TEXTS, "other", "judge"))
        limit_s = None if arguments.limit_minutes is None else 60 * arguments.limit_minutes - spent_s
        found = run_tasks(waiting, lambda task: run_task(task, recipe), file, folder, limit_s=limit_s)
    text = page(list(found.values()), size, arguments.size)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "one_shot_table.md").write_text(text + "\n")
    if arguments.write_docs:
        publish_figures(found, name)
        begin = f"<!-- one-shot table, {arguments.size}: made by `make one-shot-table` -->"
        replace_part(ROOT / "docs/results.md", begin, f"<!-- end of one-shot table, {arguments.size} -->", text)


if __name__ == "__main__":
    main()
