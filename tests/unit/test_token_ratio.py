"""The token-ratio suite: interpolation, ratios, verdicts, the fit, the sweep, and the stages of each run."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemo_minitron import api
from nemo_minitron.config.explain import validate
from nemo_minitron.plan.checks import find_problems
from nemo_minitron.plan.planner import make_plan
from nemo_minitron.stages.registry import STAGES
from tests.conftest import REPO


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))


@pytest.fixture
def rule() -> ModuleType:
    return importlib.import_module("token_ratio_rule")


@pytest.fixture
def claims() -> ModuleType:
    return importlib.import_module("token_ratio_claims")


@pytest.fixture
def arms() -> ModuleType:
    return importlib.import_module("token_ratio_arms")


@pytest.fixture
def suite() -> ModuleType:
    return importlib.import_module("token_ratio")


def test_a_loss_between_two_points_is_interpolated_over_the_logarithm(rule: ModuleType) -> None:
    curve = [(100.0, 5.0), (400.0, 4.0), (1600.0, 3.5)]
    assert rule.reached_at(curve, 4.5) == rule.Value(pytest.approx(200.0))
    assert rule.reached_at(curve, 3.75) == rule.Value(pytest.approx(800.0))
    assert rule.reached_at(curve, 4.0) == rule.Value(pytest.approx(400.0))
    assert rule.reached_at(curve, 5.0) == rule.Value(100.0)


def test_nothing_is_extrapolated(rule: ModuleType) -> None:
    curve = [(100.0, 5.0), (400.0, 4.0)]
    assert rule.reached_at(curve, 3.9) == rule.Value(400.0, "at least")
    assert rule.reached_at(curve, 5.1) == rule.Value(100.0, "at most")


def test_the_first_crossing_of_a_curve_that_rises_again_counts(rule: ModuleType) -> None:
    assert rule.reached_at([(1.0, 5.0), (4.0, 3.0), (16.0, 4.0)], 4.0).number == pytest.approx(2.0)


def test_the_ratio_at_the_loss_of_the_baseline(rule: ModuleType) -> None:
    baseline = {1: (100.0, 5.0), 2: (400.0, 4.0), 3: (1600.0, 3.5)}
    arm = {1: (110.0, 4.25), 2: (410.0, 3.75)}
    # The arm has 5.0 before its first point, and 3.5 after its last one.
    assert rule.ratio_at_baseline(baseline, arm, 1) == rule.Value(pytest.approx(100 / 110), "at least")
    assert rule.ratio_at_baseline(baseline, arm, 2) == rule.Value(pytest.approx(400 / math.sqrt(110 * 410)))
    assert rule.ratio_at_baseline(baseline, arm, 3) == rule.Value(pytest.approx(1600 / 410), "at most")


def test_the_ratio_at_the_loss_of_the_arm(rule: ModuleType) -> None:
    baseline = {1: (100.0, 5.0), 2: (400.0, 4.0)}
    arm = {1: (110.0, 4.5), 2: (410.0, 3.75)}
    assert rule.ratio_at_arm(baseline, arm, 1) == rule.Value(pytest.approx(200 / 110))
    assert rule.ratio_at_arm(baseline, arm, 2) == rule.Value(pytest.approx(400 / 410), "at least")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([(2.0, "exact"), (2.1, "at least")], "PROVEN"),
        ([(1.9, "exact"), (1.5, "at most")], "REFUTED"),
        ([(1.9, "exact"), (2.1, "exact")], "UNDECIDED"),
        ([(1.9, "at least"), (2.1, "exact")], "UNDECIDED"),
        ([(2.5, "at most"), (1.0, "exact")], "UNDECIDED"),
        ([(2.5, "exact")], "NOT_RUN"),
    ],
)
def test_verdicts_on_a_goal(values: list[tuple[float, Any]], expected: str, rule: ModuleType) -> None:
    assert rule.at_least([rule.Value(*value) for value in values], 2.0) == getattr(rule, expected)


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        ([(2.0, "exact"), (1.5, "exact")], [(2.0, "exact"), (1.6, "exact")], "PROVEN"),
        ([(2.0, "exact"), (1.5, "exact")], [(1.9, "exact"), (1.4, "at most")], "REFUTED"),
        ([(2.0, "exact"), (1.5, "exact")], [(2.1, "exact"), (1.4, "exact")], "UNDECIDED"),
        ([(2.0, "at least"), (1.5, "exact")], [(3.0, "exact"), (3.0, "exact")], "UNDECIDED"),
    ],
)
def test_verdicts_on_the_trend(earlier: list[Any], later: list[Any], expected: str, rule: ModuleType) -> None:
    before, after = ([rule.Value(*value) for value in values] for values in (earlier, later))
    assert rule.does_not_fall(before, after) == getattr(rule, expected)


def test_a_claim_needs_both_texts(rule: ModuleType) -> None:
    assert rule.on_both([rule.PROVEN, rule.PROVEN]) == rule.PROVEN
    assert rule.on_both([rule.PROVEN, rule.REFUTED]) == rule.REFUTED
    assert rule.on_both([rule.PROVEN, rule.UNDECIDED]) == rule.UNDECIDED
    assert rule.on_both([rule.PROVEN, rule.NOT_RUN]) == rule.NOT_RUN


def test_the_fit_finds_the_credit_that_the_points_were_made_with(rule: ModuleType) -> None:
    def loss(tokens: float) -> float:
        return 3.0 + 2.0 * (tokens / 1e5) ** -0.6

    budgets = (1.6e5, 6.5e5, 2.6e6)
    found = rule.fit([(d, loss(d)) for d in budgets], [(d, loss(d + 1e5)) for d in budgets])
    assert found.d0_tokens == pytest.approx(1e5, rel=0.02)
    assert (found.l_inf, found.beta) == (pytest.approx(3.0, abs=0.01), pytest.approx(0.6, abs=0.02))
    assert found.residual < 1e-3
    assert rule.fit([(1.0, 2.0), (2.0, 1.0)], [(1.0, 2.0), (2.0, 1.0), (3.0, 0.5)]) is None


def _row(arm: str, budget: int, seed: int, own: float, other: float, **more: Any) -> dict[str, Any]:
    figures = {"own": own, "other": other, "start own": 9.0, "start other": 9.5}
    return {
        "id": f"{arm} {budget} {seed}",
        "run": {"arm": arm, "budget": budget, "seed": seed, "rate": 1.0, "batch": 1.0},
        "is_sweep": seed == 0,
        "calibration_tokens": 0 if arm == "sliced" else 10,
        "training_tokens": budget,
        "counted_stages": ["prune", f"distill_{arm}_{budget}_{seed}"],
        "wall_s": {"prune": 1.0, f"distill_{arm}_{budget}_{seed}": budget / 10, "evaluate": 1000.0},
        "resumed": [],
        "figures": {name: {"loss_nats_per_token": loss} for name, loss in figures.items()},
        **more,
    }


def _rows() -> list[dict[str, Any]]:
    losses = {"sliced": {100: 5.0, 200: 4.5, 400: 4.0}, "compensated": {100: 4.2, 200: 3.9, 400: 3.8}}
    return [
        _row(arm, budget, seed, loss + 0.1 * seed, loss + 0.1 * seed + (0.35 if arm == "compensated" else 0.0))
        for arm, by_budget in losses.items()
        for budget, loss in by_budget.items()
        for seed in (1, 2)
    ]


def _verdicts(claims: ModuleType, rows: list[dict[str, Any]]) -> list[list[str]]:
    design = claims.Design("sliced", (100, 200, 400), (1, 2))
    lines = claims.claim_table(rows, design).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_claims_are_judged_on_both_texts_at_the_largest_budget(claims: ModuleType) -> None:
    tokens, trend, wall = _verdicts(claims, _rows())
    # At 4.0 + 0.1 seed: own text between 110 and 210 tokens, the other text not even with 410.
    own = 400 / math.exp(math.log(110) + 2 / 3 * math.log(210 / 110))
    assert tokens == [
        *("compensated", "at least 2x fewer tokens"),
        *(f"{own:.2f}", "proven", f"≤ {400 / 410:.2f}", "**refuted**", "**refuted**"),
    ]
    assert trend[3] == "undecided"  # the middle budget has a bound: its loss is above the arm's first point
    assert wall[3] == "proven"


def test_there_is_no_verdict_before_all_runs_are_there(claims: ModuleType) -> None:
    rows = [row for row in _rows() if row["id"] != "sliced 200 2"]
    assert all(line[-1] == "not run" for line in _verdicts(claims, rows))


def test_an_interrupted_stage_gives_no_verdict_on_time(claims: ModuleType) -> None:
    rows = _rows()
    rows[0]["resumed"] = ["prune"]
    tokens, _, wall = _verdicts(claims, rows)
    assert (tokens[3], wall[3]) == ("proven", "not run")


def test_times_measured_beside_other_work_have_no_verdict(claims: ModuleType) -> None:
    rows = [{**row, "shared_machine": True} for row in _rows()]
    tokens, _, wall = _verdicts(claims, rows)
    assert (tokens[3], wall[3], wall[-1]) == ("proven", "no verdict", "no verdict")
    assert wall[2] == _verdicts(claims, _rows())[2][2], "the times are shown"


def test_the_page_and_the_picture(claims: ModuleType, tmp_path: Path) -> None:
    rows = [*_rows(), _row("sliced", 100, 0, 5.0, 5.0)]
    text = claims.page(rows, claims.Design("sliced", (100, 200, 400), (1, 2)), "toy", "toy.png")
    assert "| compensated | 100 | 110 | 1, 1 | 4.300, 4.400 | 9.000, 9.000 |" in text
    assert "![Held-out loss over tokens](toy.png)" in text
    for name in ("picture.png", "picture.svg"):
        claims.picture(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_from_scratch_is_judged_at_the_loss_of_the_repaired_student(claims: ModuleType) -> None:
    scratch = [
        _row("from_scratch", budget, seed, own, other, calibration_tokens=0)
        for seed in (1, 2)
        for budget, own, other in ((1100, 5.0, 5.0), (3300, 4.35, 4.35))
    ]
    design = claims.Design("sliced", (100, 200, 400), (1, 2), (1100, 3300))
    table = claims.scratch_table([*_rows(), *scratch], design)
    # The repaired student has read 110 tokens: 4.3 and 4.4 on its own text, 4.65 and 4.75 on the other.
    own, other = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:])
    assert own[1:3] == ["4.300, 4.400", "4.350, 4.350"]
    assert (own[3].split(" to ")[1], own[4]) == ("≥ 30.00", "undecided")
    assert other[4] == "**refuted**"
    table = claims.scratch_table([*_rows(), *scratch[:-1]], design)
    assert table.count("not run") == 2, "a budget of a seed is missing"
    table = claims.scratch_table([*_rows(), *scratch[::2]], design)
    assert table.count("not run") == 2, "the largest budget of each seed is missing"
    assert "from_scratch" not in claims.ratio_table([*_rows(), *scratch], claims.Design("sliced", (100,), (1, 2)))
    assert (
        claims.scratch_table(_rows(), claims.Design("sliced", (100,), (1, 2))) == "The model from scratch was not run."
    )


def test_the_sweep_tries_rates_first_and_then_batches_at_the_best_rate(suite: ModuleType) -> None:
    size = suite.SIZES["toy"]
    runs = suite.sweep("sliced", size, {})
    assert [(run.rate, run.batch) for run in runs[:3]] == [(1 / 3, 1.0), (1.0, 1.0), (3.0, 1.0)]
    found = {run.id: _row("sliced", 1, 0, loss, 9.0) for run, loss in zip(runs[:3], (4.2, 4.3, 4.1), strict=True)}
    batches = suite.sweep("sliced", size, found)[3:]
    assert [(run.rate, run.batch) for run in batches] == [(3.0, 0.5), (3.0, 2.0)]
    found[batches[0].id] = _row("sliced", 1, 0, 4.0, 9.0)
    counted = [run for run in suite.suite_runs(size, {"sliced": size.budgets}, found) if run.seed]
    assert {(run.rate, run.batch) for run in counted} == {(3.0, 0.5)}
    assert [(run.budget, run.seed) for run in counted[:4]] == [*((size.budgets[0], seed) for seed in (1, 2, 3)),
                                                              (size.budgets[1], 1)]  # fmt: skip


def test_filters_keep_the_sweeps(suite: ModuleType, arms: ModuleType) -> None:
    size = suite.SIZES["smollm2"]
    runs = suite.selected(suite.suite_runs(size, {"sliced": size.budgets}, {}), [131_072], [2])
    assert [(run.budget, run.seed) for run in runs if run.seed] == [(131_072, 2)]
    assert sum(run.seed == arms.SWEEP_SEED for run in runs) == 5


def test_arms_that_a_package_or_a_teacher_does_not_allow_are_left_out(arms: ModuleType) -> None:
    trained, fetched = {"teacher": {"kind": "train"}}, {"teacher": {"kind": "import"}}
    assert "compensated_layers" not in arms.usable_arms(["distill", "compensate"], trained)
    assert arms.usable_arms(["distill", "distill_layers"], trained) == list(arms.ARMS)
    assert "from_scratch" not in arms.usable_arms(["distill", "distill_layers"], fetched)


def test_from_scratch_is_a_random_student_that_is_trained_like_the_teacher(
    suite: ModuleType, arms: ModuleType, tmp_path: Path
) -> None:
    _, stages = _recipe(suite, "toy", tmp_path)
    budgets = suite.budgets_of("from_scratch", suite.SIZES["toy"], stages)
    read = 163_840 + 64 * 128 + 256 * 128 + 8192
    assert budgets == (10 * read, 30 * read)
    task = arms.task_of(arms.Run("from_scratch", budgets[-1], 2), stages, 16)
    training, weights = task.stages[f"distill_from_scratch_{budgets[-1]}_s2_r1_b1"], task.stages["random_s2"]
    assert (weights["kind"], weights["inputs"]) == ("init", {"like": "prune_activation_s2"})
    assert (training["kind"], training["lr"]) == ("train", stages["teacher"]["lr"])
    assert training["inputs"] == {"model": "random_s2", "data": "data"}
    assert (task.facts["calibration_tokens"], task.facts["training_tokens"]) == (0, budgets[-1])
    assert task.facts["counted_stages"] == [f"distill_from_scratch_{budgets[-1]}_s2_r1_b1"]


@pytest.mark.parametrize("size", ["toy", "smollm2", "gpu"])
def test_every_run_composes_and_passes_the_checks(
    size: str, suite: ModuleType, arms: ModuleType, tmp_path: Path
) -> None:
    recipe, stages = _recipe(suite, size, tmp_path)
    for arm in arms.usable_arms(STAGES, stages):
        run = arms.Run(arm, suite.budgets_of(arm, suite.SIZES[size], stages)[-1], 1, rate=1 / 3, batch=0.5)
        task = arms.task_of(run, stages, recipe.execution.parallel.micro_batch_size)
        raw = {**recipe.model_dump(mode="json"), "stages": task.stages}
        raw["execution"]["parallel"]["micro_batch_size"] = task.micro_batch_size
        problems = list(find_problems(make_plan(validate(raw, where=arm))))
        assert all("not fetched yet" in problem or "matches no file" in problem for problem in problems), problems
        assert task.facts["training_tokens"] == run.budget
        assert set(task.measures) == {"own", "other", "start own", "start other"}


def _recipe(suite: ModuleType, size: str, root: Path) -> tuple[Any, dict[str, Any]]:
    chosen = suite.SIZES[size]
    overrides = [f"execution.run_root={root}", f"execution.assets_dir={root}", *chosen.overrides]
    recipe = api.load_recipe(suite.RECIPES / f"{chosen.recipe}.yaml", overrides)
    return recipe, suite.explicit_stages(recipe)


def test_the_arms_differ_only_in_how_the_student_is_made(suite: ModuleType, arms: ModuleType, tmp_path: Path) -> None:
    _, stages = _recipe(suite, "toy", tmp_path)
    tasks = {arm: arms.task_of(arms.Run(arm, 163_840, 2), stages, 16) for arm in arms.ARMS if arm != "from_scratch"}
    trained = {arm: task.stages[f"distill_{arm}_163840_s2_r1_b1"] for arm, task in tasks.items()}
    students = {arm: stage["inputs"]["student"] for arm, stage in trained.items()}
    assert students == {
        "sliced": "prune_activation_s2",
        "sliced_wanda": "prune_wanda_s2",
        "compensated": "compensate_one_shot_activation_s2",
        "sequential": "compensate_sequential_activation_s2",
        "compensated_layers": "layers_compensated_layers_163840_s2_r1_b1",
    }
    keys = {
        arm: {key: value for key, value in stage.items() if key != "inputs"}
        for arm, stage in trained.items()
        if arm != "compensated_layers"
    }
    assert all(value == keys["sliced"] for value in keys.values())
    assert keys["sliced"]["seed"] == 2
    layers = tasks["compensated_layers"].stages["layers_compensated_layers_163840_s2_r1_b1"]
    assert layers["num_steps"] + trained["compensated_layers"]["num_steps"] == keys["sliced"]["num_steps"]
    assert layers["num_steps"] == 20
    assert layers["seed"] != keys["sliced"]["seed"], "both would begin with the same samples"


def test_scoring_and_repair_are_counted_as_tokens(suite: ModuleType, arms: ModuleType, tmp_path: Path) -> None:
    _, stages = _recipe(suite, "toy", tmp_path)
    calibration = {
        arm: arms.task_of(arms.Run(arm, 163_840, 1), stages, 16).facts["calibration_tokens"]
        for arm in ("sliced", "compensated")
    }
    assert calibration == {"sliced": 64 * 128, "compensated": 64 * 128 + 256 * 128 + 8192}
    task = arms.task_of(arms.Run("compensated", 163_840, 1), stages, 16)
    assert task.facts["counted_stages"] == [
        *("score_activation_s1", "select_activation_s1", "prune_activation_s1"),
        *("compensate_one_shot_activation_s1", "distill_compensated_163840_s1_r1_b1"),
    ]
