"""Estimates of a whole plan: every stage counts or is named, and what `plan` proposes can be run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.distillation.flops import forward_flops_per_token, head_flops_per_token
from nemo_minitron.families import read_shape
from nemo_minitron.plan.checks import find_problems
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.plan.resources.costs import Estimate, estimates, totals
from nemo_minitron.plan.resources.hardware import HARDWARE
from nemo_minitron.plan.resources.summary import memory_warnings, resource_facts
from nemo_minitron.pruning.depth import runs_of
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import Scoring
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.workload.load import training_load
from nemo_minitron.workload.memory import GIB, memory_of
from nemo_minitron.workload.scoring import depth_passes, scoring_load
from tests.conftest import REPO, TOY, Cli
from tests.e2e.test_toy_layers import LAYERS

SEARCH = REPO / "recipes/toy/search.yaml"
FIRST = "search_l3_h56_f160"
"""The first candidate of the search."""
MINITRON_4B = REPO / "recipes/llama31_8b/width_4b.yaml"
REPAIR = "+stages.search.compensation={num_samples: 64, seq_len_tokens: 128, heldout_tokens: 512}"
LLAMA = read_shape(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)


def _plan(recipe: Path, tmp_path: Path, *overrides: str) -> RunPlan:
    return load_plan(recipe, [f"execution.run_root={tmp_path}", *overrides], checked=False)


# --- searches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["toy/search", "toy/aligned", "nemotron4_15b/search_4b", "template"])
def test_each_stage_that_runs_a_model_is_estimated_or_named(recipe: str, tmp_path: Path, minitron: Cli) -> None:
    file = REPO / f"recipes/{recipe}.yaml"
    plan = _plan(file, tmp_path)
    output = minitron("plan", file, f"execution.run_root={tmp_path}")[1]
    text = "not estimated and not in the total: "
    named = output[output.index(text) + len(text) :].split("\n", 1)[0].split(", ")
    for call in plan.calls:
        if STAGES[call.kind].uses_gpu:
            assert (call.name in estimates(plan)) != (call.name in named), call.name


def test_what_a_search_decides_is_planned_with_its_largest_candidate(tmp_path: Path, minitron: Cli) -> None:
    found = estimates(_plan(SEARCH, tmp_path))
    bounds = [name for name, estimate in found.items() if estimate.is_bound]
    evaluations = ["evaluate_pruned", "evaluate_random", "evaluate_distilled"]
    assert bounds == ["search_r2_p1", "search_r2_p2", "search_r2_p3", "distill", *evaluations]
    # The second candidate has 158,088 parameters, in fp32.
    assert {found[name].memory.weights for name in bounds} == {4 * 158_088}
    assert found["search_r2_p1"].tokens == 12 * 8 * 128
    output = " ".join(minitron("plan", SEARCH, f"execution.run_root={tmp_path}")[1].split())
    assert f"until the search has finished: {', '.join(bounds)}" in output
    assert "student: unknown until the search has found it" in output


def test_the_repair_of_a_candidate_is_counted(tmp_path: Path) -> None:
    without, repaired = (estimates(_plan(SEARCH, tmp_path, *words)) for words in ((), (REPAIR,)))
    assert repaired[FIRST].flops > without[FIRST].flops
    assert repaired[FIRST].seconds > without[FIRST].seconds
    # The repaired model beside the pruned one, and the files of its layers: less than a model.
    model = 2 * 141_960
    assert model < repaired[FIRST].work_bytes - without[FIRST].work_bytes < 2 * model
    assert repaired["search_r2_p1"] == without["search_r2_p1"], "only the first rung repairs"


def test_check_refuses_a_layout_that_does_not_divide_the_batch_of_candidates(tmp_path: Path) -> None:
    problems = list(find_problems(_plan(SEARCH, tmp_path, "execution.parallel.dp=3")))
    assert any("search.retraining.global_batch_size = 8: must be a multiple" in problem for problem in problems)


# --- proposals ----------------------------------------------------------------------------------


def _proposed(stage: str, recipe: Path, tmp_path: Path, *words: str) -> list[RunPlan]:
    """Return the plan with each proposal for a stage copied into the recipe."""
    keys = {f"execution.parallel_by_stage.{stage}"}
    facts = resource_facts(_plan(recipe, tmp_path, *words))["proposals"][stage]
    own = [word for word in words if word.split("=")[0].lstrip("+") not in keys]
    layouts = [one["words"].split(" (")[0] for one in facts]
    return [_plan(recipe, tmp_path, *own, f"++execution.parallel_by_stage.{stage}={words}") for words in layouts]


def test_a_proposal_for_a_recipe_with_context_parallelism_uses_as_many_gpus_as_asked_for(tmp_path: Path) -> None:
    own = "++execution.parallel_by_stage.distill={tp: 2, dp: 2, cp: 2, sequence_parallel: true}"
    plan = _plan(MINITRON_4B, tmp_path, own, "execution.planning.num_gpus=8")
    words = [one["words"].split(" (")[0] for one in resource_facts(plan)["proposals"]["distill"]]
    assert words
    for one in words:
        merged = _plan(MINITRON_4B, tmp_path, own, f"execution.parallel_by_stage.distill={one}")
        assert merged.call("distill").parallel.world_size == 8


@pytest.mark.parametrize(
    "loss",
    [
        ("stages.distill.loss.hidden={}",),
        ("stages.distill.loss.anchors={}", "stages.distill.inputs.plan=select"),
    ],
    ids=["hidden", "anchors"],
)
@pytest.mark.parametrize("num_gpus", [8, 64])
def test_check_accepts_what_is_proposed(loss: tuple[str, ...], num_gpus: int, tmp_path: Path) -> None:
    # With this little memory, pipeline stages or recomputation are needed where they are possible.
    words = (*loss, f"execution.planning={{num_gpus: {num_gpus}, reserve_gib: 40}}")
    before = set(find_problems(_plan(MINITRON_4B, tmp_path, *loss)))
    plans = _proposed("distill", MINITRON_4B, tmp_path, *words)
    assert plans
    for plan in plans:
        assert set(find_problems(plan)) <= before
        assert plan.call("distill").parallel.world_size == num_gpus


def test_layers_that_are_trained_apart_get_no_full_recomputation(tmp_path: Path) -> None:
    words = (LAYERS, "stages.distill.inputs={student: layers, plan: select}", "stages.distill.loss.anchors={}")
    recipe = REPO / "recipes/toy/depth.yaml"
    plans = _proposed("layers", recipe, tmp_path, *words, "execution.planning={hardware: H100, num_gpus: 2}")
    assert plans
    assert all(not list(find_problems(plan)) for plan in plans)


def test_stages_other_than_trainings_get_layouts_that_fit(tmp_path: Path) -> None:
    many = "++execution.parallel_by_stage.score={dp: 8, micro_batch_size: 128}"
    plan = _plan(MINITRON_4B, tmp_path, many, "execution.planning.hardware=L40S")
    facts = resource_facts(plan)
    warnings = {line.split(":")[0]: line for line in memory_warnings(plan, facts)}
    assert "fits: {tp: 1, pp: 1, cp: 1, dp: 8, micro_batch_size: 1" in warnings["score"]
    (again,) = _proposed("score", MINITRON_4B, tmp_path, many, "execution.planning.hardware=L40S")[:1]
    assert estimates(again)["score"].fits
    small = ("execution.planning.hardware=A6000", "execution.planning.reserve_gib=47.98")
    plan = _plan(SEARCH, tmp_path, *small, "execution.parallel.micro_batch_size=8")
    assert resource_facts(plan)["proposals"][FIRST], "those of its retraining"


def test_a_stage_that_fits_in_no_layout_says_what_helps(tmp_path: Path) -> None:
    recipe = REPO / "recipes/llama31_8b/width_4b_repaired.yaml"
    words = ("execution.planning={reserve_gib: 79, num_gpus: 2}", "stages.evaluate_teacher.tasks=[arc_easy]")
    plan = _plan(recipe, tmp_path, *words)
    warnings = {line.split(":")[0]: line for line in memory_warnings(plan, resource_facts(plan))}
    assert "no layout fits on 2 GPUs; use more or larger ones" in warnings["distill"]
    assert "one layer at a time in every layout; use larger GPUs" in warnings["compensate"]
    assert "need the whole model on each process" in warnings["evaluate_teacher"]


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [4, 7])
@pytest.mark.parametrize("lengths", [(), (2,), (1, 3)])
def test_removing_runs_of_layers_computes_what_is_behind_them(num_layers: int, lengths: tuple[int, ...]) -> None:
    keys = Scoring(layer_metrics=("lm_loss", "logit_mse", "block_influence"), block_lengths=lengths)
    every = [runs_of(num_layers, length) for length in {1, *lengths}]
    layers = sum(num_layers + sum(num_layers - run.stop for run in runs) for runs in every)
    assert depth_passes(keys, num_layers) == (layers, sum(1 + len(runs) for runs in every))


def test_passes_of_iterative_removals_by_hand() -> None:
    """Four layers, two drops: 10 layers for single layers; 10; then 4 of the whole model, 3, and 2 + 1."""
    by_loss = Scoring(layer_metrics=("lm_loss",), iterative_drops=2)
    assert depth_passes(by_loss, 4) == (10 + 10 + 10, 5 + 5 + 5)
    influence = Scoring(layer_metrics=("block_influence",), iterative_drops=2)
    assert depth_passes(influence, 4) == (4 + 3, 2)
    assert depth_passes(Scoring(), 4) == (0, 0)


def test_a_depth_metric_costs_its_passes_and_keeps_the_streams_and_logits() -> None:
    keys = Scoring(layer_metrics=("lm_loss",), num_samples=64, depth_samples=16)
    load = scoring_load(LLAMA, keys, Parallel())
    width, depth = load.phases
    forward, head = forward_flops_per_token(LLAMA, 512), head_flops_per_token(LLAMA)
    assert width.flops_per_token == forward
    assert depth.tokens == 16 * 512
    assert depth.flops_per_token == pytest.approx((32 + 496) * (forward - head) / 32 + 33 * head)
    memory, streams = memory_of(depth.work), 33 * 2 * 512 * 4096
    assert memory.activations == memory_of(width.work).activations + streams
    assert memory.loss == (2 * 2 + 3 * 4) * 512 * 128_256
    assert memory_of(width.work).loss == 2 * 2 * 512 * 128_256


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_taylor_has_a_backward_pass_without_gradients_of_weights(recompute: str) -> None:
    layout = Parallel.model_validate({"tp": 2, "recompute": recompute, "micro_batch_size": 4})
    plain, taylor = (scoring_load(LLAMA, Scoring(method=method), layout) for method in ("activation", "taylor"))
    forward = forward_flops_per_token(LLAMA, 512)
    assert 2 * forward < taylor.flops_per_token < 2.05 * forward
    memory = memory_of(taylor.work)
    assert memory.gradients == memory.optimizer == 0
    keys = load_plan(MINITRON_4B, [], checked=False).recipe.stages["distill"]
    training = training_load(LLAMA, None, keys.model_copy(update={"seq_len_tokens": 512}), 1, layout)  # type: ignore[arg-type]
    kept = replace(training.work, parallel=layout.model_copy(update={"recompute": "none"}), validates=False)
    assert memory.activations == memory_of(kept).activations
    assert memory.activations > 10 * memory_of(plain.work).activations
    assert memory.loss == (2 + 4 * 4) * 4 * 512 * 128_256 // 2


# --- time, disk and the tables ------------------------------------------------------------------


def test_fp32_runs_without_tensor_cores(tmp_path: Path, minitron: Cli) -> None:
    recipe, gpu = REPO / "recipes/toy/compensated.yaml", "execution.planning.hardware=H100"
    found = [
        estimates(_plan(recipe, tmp_path, gpu, f"stages.compensate.precision={precision}"))["compensate"].seconds
        for precision in ("fp32", "bf16")
    ]
    assert found[0] / found[1] == pytest.approx(989.4 / 67)
    measured = estimates(_plan(recipe, tmp_path, gpu, "execution.peak_tflops=989.4"))["compensate"]
    assert measured.seconds == pytest.approx(found[1]), "a value of the recipe counts in every precision"
    output = " ".join(minitron("plan", recipe, f"execution.run_root={tmp_path}", gpu)[1].split())
    assert "989.4 TFLOPS of each process (67 in fp32)" in output
    assert all(one.fp32_tflops < one.peak_tflops for one in HARDWARE.values() if one.name != "CPU")
    on_cpu = [estimates(_plan(recipe, tmp_path, f"stages.compensate.precision={p}")) for p in ("fp32", "bf16")]
    assert on_cpu[0]["compensate"].seconds == on_cpu[1]["compensate"].seconds


def _sum(found: dict[str, Estimate], what: str) -> int:
    return sum(getattr(estimate, what) for estimate in found.values())


def test_checkpoints_of_one_training_are_on_disk_at_a_time(tmp_path: Path) -> None:
    plan = _plan(REPO / "recipes/toy/chain.yaml", tmp_path)
    found = estimates(plan)
    works = [found[name].work_bytes for name in ("distill", "distill_2")]
    assert min(works) > 0
    assert totals(plan, found)["disk_gib"] * GIB == pytest.approx(_sum(found, "output_bytes") + max(works))
    assert found["distill"].facts()["disk_gib"] * GIB == found["distill"].output_bytes + works[0]


def test_jobs_of_a_cluster_that_can_run_together_have_checkpoints_together(tmp_path: Path) -> None:
    for recipe in ("toy/search", "toy/chain"):
        plan = _plan(REPO / f"recipes/{recipe}.yaml", tmp_path, "execution.launcher=slurm")
        found = estimates(plan)
        # The seven candidates of the first rung; in the chain each training needs the one before it.
        first = [found[name].work_bytes for name in found if name.startswith("search_l")]
        works = sum(first) if first else max(found[name].work_bytes for name in ("distill", "distill_2"))
        assert totals(plan, found)["disk_gib"] * GIB == pytest.approx(_sum(found, "output_bytes") + works)


def test_candidates_keep_the_checkpoints_of_their_retraining(tmp_path: Path) -> None:
    found = [
        estimates(_plan(SEARCH, tmp_path, f"stages.search.retraining.keep_checkpoints={kept}"))[FIRST]
        for kept in (1, 4)
    ]
    # In fp32 a checkpoint has weights and two moments.
    assert found[1].work_bytes - found[0].work_bytes == 3 * 12 * 141_960
    # One more while it is written, and the pruned model.
    assert found[0].work_bytes == 2 * 12 * 141_960 + 2 * 141_960
    assert found[0].output_bytes == 4 * 141_960


@pytest.mark.parametrize("hidden", ["null", "{}"])
@pytest.mark.parametrize("recipe", ["width_4b", "width_4b_repaired"])
def test_the_columns_of_the_memory_table_sum_to_the_peak(
    recipe: str, hidden: str, tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = (f"execution.run_root={tmp_path}", f"stages.distill.loss.hidden={hidden}")
    output = minitron("plan", REPO / f"recipes/llama31_8b/{recipe}.yaml", *words)[1]
    table = output[output.index("GiB of a process") : output.index("what it takes")]
    assert ("hid-" in table, "sums" in table) == (hidden != "null", recipe == "width_4b_repaired")
    assert "…" not in table
    rows = [line.split() for line in table.splitlines()]
    named = ("score", "distill", "compensate")
    figures = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row and row[0] in named}
    for name, (peak, *parts) in figures.items():
        assert sum(parts) == pytest.approx(peak, abs=0.005 * (len(parts) + 1)), name
    assert len(figures) >= 2


def test_the_toy_student_is_not_bounded(tmp_path: Path) -> None:
    assert not any(estimate.is_bound for estimate in estimates(_plan(TOY, tmp_path)).values())
