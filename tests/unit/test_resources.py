"""Estimates of time, cost, disk space and layouts, compared with calculations by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.api import load_plan, load_recipe
from nemo_minitron.plan.resources import costs
from nemo_minitron.plan.resources.costs import estimates, totals
from nemo_minitron.plan.resources.hardware import HARDWARE, hardware_of
from nemo_minitron.plan.resources.step_time import step_time
from nemo_minitron.plan.resources.summary import memory_warnings, resource_facts
from nemo_minitron.plan.shapes import model_shape
from nemo_minitron.schema.execution import Kernels, Parallel
from nemo_minitron.schema.losses import HiddenLoss, Loss
from nemo_minitron.schema.training import Fp8Teacher
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.workload.heldout import heldout_batch_size
from nemo_minitron.workload.load import Load, alignment_load, distillation_load
from nemo_minitron.workload.memory import GIB, memory_of
from tests.conftest import REPO, TOY, Cli

MINITRON_4B = REPO / "recipes/llama31_8b/width_4b.yaml"
NO_PROMPTS = "stages.evaluate_teacher.prompts=[]"
DGX_32 = "execution.parallel={tp: 8, dp: 32, sequence_parallel: true, micro_batch_size: 4}"


def _plan(recipe: Path, tmp_path: Path, *overrides: str):  # type: ignore[no-untyped-def]
    return load_plan(recipe, [f"execution.run_root={tmp_path}", *overrides], checked=False)


def test_the_papers_distillation_takes_a_plausible_number_of_gpu_hours(tmp_path: Path) -> None:
    """94B tokens on 32 DGX H100 (2408.11796, section 3): three passes of the student and one of the teacher."""
    distill = estimates(_plan(MINITRON_4B, tmp_path, DGX_32))["distill"]
    assert distill.tokens == 9961 * 1152 * 8192
    # By hand: 2 operations per weight and pass, without embeddings; two attention products over half the sequence.
    student, teacher = 4_512_746_496 - 128_256 * 3072, 8_030_261_248 - 128_256 * 4096
    attention = 32 * 2 * 2 * (32 * 128) * 8192 / 2
    by_hand = (6 * student + 2 * teacher + 4 * attention) * distill.tokens
    assert distill.flops == pytest.approx(by_hand, rel=1e-3)
    assert distill.gpu_hours == pytest.approx(distill.flops / (0.40 * 989.4e12) / 3600)
    assert 2500 < distill.gpu_hours < 4000
    assert distill.seconds / 3600 == pytest.approx(distill.gpu_hours / 256)
    assert distill.fits


def test_on_a_cpu_all_processes_share_the_memory_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, two = REPO / "recipes/smollm2_135m/width.yaml", "execution.parallel.dp=2"
    peak = max(estimate.memory.peak for estimate in estimates(_plan(recipe, tmp_path)).values())
    monkeypatch.setattr(costs, "usable_memory_bytes", lambda: int(1.5 * peak))

    def warned(*overrides: str) -> list[str]:
        plan = _plan(recipe, tmp_path, *overrides)
        return list(memory_warnings(plan, resource_facts(plan)))

    assert warned() == []
    (warning,) = warned(two)
    assert warning.startswith("distill: needs ")
    assert f"GiB (all processes), and this machine has {1.5 * peak / GIB:.1f} GiB; reduce dp" in warning
    assert warned(two, "execution.device=cpu", "launcher=slurm", "cluster=slurm") == []


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ((), "CPU"),
        (("execution.device=auto",), "CPU"),
        (("execution.device=cuda",), "H100"),
        (("execution.device=auto", "cluster=slurm"), "H100"),
        (("execution.device=auto", "cluster=slurm", "cluster.gpus_per_node=0"), "CPU"),
        (("cluster=slurm",), "CPU"),
        (("execution.planning.hardware=A100",), "A100"),
    ],
)
def test_the_default_hardware_follows_the_device_and_the_cluster(
    keys: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    assert hardware_of(_plan(TOY, tmp_path, *keys).recipe).name == name


def test_mfu_price_and_hardware_are_keys(tmp_path: Path) -> None:
    usual = estimates(_plan(MINITRON_4B, tmp_path, DGX_32))["distill"]
    half = estimates(_plan(MINITRON_4B, tmp_path, DGX_32, "execution.planning.mfu=0.2"))["distill"]
    assert half.seconds == pytest.approx(2 * usual.seconds)
    keys = ("execution.planning.hardware=A100", "execution.planning.price_per_gpu_hour=2")
    plan = _plan(MINITRON_4B, tmp_path, DGX_32, *keys)
    other = estimates(plan)
    assert other["distill"].cost == pytest.approx(2 * other["distill"].gpu_hours)
    total = totals(plan, other)
    assert total["cost"] == pytest.approx(2 * total["gpu_hours"])
    assert other["distill"].seconds > 2 * usual.seconds
    assert all(found.peak_tflops > 0 for found in HARDWARE.values())


def test_the_warning_about_memory_proposes_a_layout_that_fits(tmp_path: Path) -> None:
    plan = _plan(MINITRON_4B, tmp_path, "execution.parallel={tp: 1, dp: 8, micro_batch_size: 4}")
    facts = resource_facts(plan)
    assert not facts["stages"]["distill"]["fits"]
    (warning,) = memory_warnings(plan, facts)
    assert warning.startswith("distill: ")
    assert "can use 74.0 GiB; fits: {" in warning
    for proposal in facts["proposals"]["distill"]:
        assert proposal["peak_gib"] <= 74.0
        words = proposal["words"].split(" (")[0]
        again = resource_facts(_plan(MINITRON_4B, tmp_path, f"execution.parallel={words}"))
        assert again["stages"]["distill"]["fits"], "the proposal can be copied into the recipe"
        assert again["stages"]["distill"]["memory"]["peak_gib"] == pytest.approx(proposal["peak_gib"], abs=1e-3)


def test_proposals_divide_the_model_and_the_batch(tmp_path: Path) -> None:
    plan = _plan(MINITRON_4B, tmp_path, DGX_32, "execution.planning.num_gpus=256")
    proposed = resource_facts(plan)["proposals"]["distill"]
    assert len(proposed) == 3
    for one in proposed:
        layout = one["layout"]
        assert layout["tp"] * layout["pp"] * layout["dp"] == 256
        assert 1152 % (layout["dp"] * layout["micro_batch_size"]) == 0
        assert 8 % layout["tp"] == 0


def _minitron_4b(layout: Parallel, **keys: Any) -> Load:
    recipe = load_recipe(MINITRON_4B, [])
    student, teacher = model_shape(recipe, "distill"), model_shape(recipe, "teacher")
    assert student is not None
    stage = recipe.stages["distill"]
    assert isinstance(stage, DistillStage)
    load = distillation_load(student, teacher, stage.model_copy(update=keys), 1, layout)
    assert load is not None
    return load


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Parallel(tp=8, sequence_parallel=True), 0.31),
        (Parallel(tp=2, dp=4, sequence_parallel=True, overlap_grad_reduce=True), 0.44),
        (Parallel(), 0.48),
    ],
)
def test_tensor_parallelism_costs_what_its_bytes_take(layout: Parallel, expected: float) -> None:
    """By hand for tp 8: 21.6 GB of collectives at 370 GB/s: 58 ms, beside 104 ms of kernels (50 ms of products)."""
    found = step_time(_minitron_4b(layout), layout, HARDWARE["H100"], 989.4, 8)
    assert found.mfu == pytest.approx(expected, abs=0.01)


def test_a_small_share_of_a_short_batch_waits_for_launches() -> None:
    layout = Parallel(tp=8, sequence_parallel=True)
    short = step_time(_minitron_4b(layout, seq_len_tokens=2048), layout, HARDWARE["H100"], 989.4, 8)
    assert short.mfu < 0.15
    wide = layout.model_copy(update={"micro_batch_size": 4})
    assert step_time(_minitron_4b(wide, seq_len_tokens=2048), wide, HARDWARE["H100"], 989.4, 8).mfu > 1.8 * short.mfu


def test_gradients_that_no_backward_pass_hides_and_bubbles_cost_time() -> None:
    hidden = Parallel(tp=2, dp=128, overlap_grad_reduce=True)
    seen = hidden.model_copy(update={"overlap_grad_reduce": False})
    staged = Parallel(tp=2, pp=4, dp=32, overlap_grad_reduce=True)
    found = [step_time(_minitron_4b(one), one, HARDWARE["H100"], 989.4, 8).mfu for one in (hidden, seen, staged)]
    assert found[0] > found[1]
    assert found[0] > found[2]
    again = Parallel(tp=2, dp=128, overlap_grad_reduce=True, recompute="full")
    assert step_time(_minitron_4b(again), again, HARDWARE["H100"], 989.4, 8).mfu < found[0]


def test_a_loss_of_hidden_states_is_planned_with_the_states_that_it_compares() -> None:
    two = HiddenLoss(pairs=((0, 0), (5, 5)), states=("block_output", "mlp_input"))
    for hidden, states in ((HiddenLoss(), 2), (HiddenLoss(embedding=False), 1), (two, 5)):
        assert _minitron_4b(Parallel(), loss=Loss(hidden=hidden)).work.hidden_pairs == states


@pytest.mark.parametrize(("recompute", "measured_gib"), [("none", 127.2), ("none", 118.6), ("full", 95.3)])
def test_the_peak_of_the_measured_gpu_runs_is_planned_within_a_tenth(recompute: str, measured_gib: float) -> None:
    """One H200, 8B to 4.5B (docs/results.md): torch layers, Transformer Engine, and with full recomputation."""
    work = _minitron_4b(Parallel(recompute=recompute), global_batch_size=4).work  # type: ignore[arg-type]
    as_then = Kernels(chunk_tokens=523, head_gradient_in_place=False, fused_kl="off")
    planned = memory_of(replace(work, on_gpu=True, kernels=as_then)).peak / GIB
    assert planned == pytest.approx(measured_gib, rel=0.1)


def test_chunks_on_a_gpu_are_counted() -> None:
    work = replace(_minitron_4b(Parallel()).work, on_gpu=True)
    logits = 4096 * 128_256
    fused, mixed = memory_of(work).loss, memory_of(replace(work, lone_forward_kl=False)).loss
    assert fused == pytest.approx(2 * 2 * logits + 2 * 8192 * (4096 + 3072), rel=0.001), "no fp32 gradient of the head"
    assert mixed - fused == 3 * 4 * 523 * 128_256, "three blocks in fp32"


def test_an_fp8_teacher_keeps_both_copies_of_its_weights() -> None:
    plain = memory_of(_minitron_4b(Parallel()).work)
    in_fp8 = memory_of(_minitron_4b(Parallel(), teacher_fp8=Fp8Teacher()).work)
    assert in_fp8.teacher == plain.teacher * 3 // 2
    assert in_fp8.peak - plain.peak == in_fp8.teacher - plain.teacher


def test_recipes_for_one_node_use_a_layout_that_the_planner_would_choose(tmp_path: Path) -> None:
    for name in ("llama31_8b/width_4b", "nemotron4_15b/width_8b", "qwen3_8b/width_6b"):
        plan = _plan(REPO / f"recipes/{name}.yaml", tmp_path, "execution.planning.num_gpus=8")
        layout = plan.call("distill").parallel.model_dump()
        assert any(one["layout"] == layout for one in resource_facts(plan)["proposals"]["distill"]), name


def test_disk_space_includes_weights_and_kept_checkpoints(tmp_path: Path) -> None:
    count = 4_512_746_496
    # bf16 weights; checkpoints also hold fp32 masters and two moments; two are kept while a third is written.
    expected = 2 * count + 3 * 14 * count
    assert estimates(_plan(MINITRON_4B, tmp_path, DGX_32))["distill"].disk_bytes == expected


def test_checkpoints_of_a_corrected_teacher_have_its_states_as_well(tmp_path: Path) -> None:
    student, teacher = 4_512_746_496, 8_030_261_248
    correction = "+stages.distill.teacher_correction={pretraining_lr: 1e-4}"
    found = estimates(_plan(MINITRON_4B, tmp_path, DGX_32, correction))["distill"]
    assert found.disk_bytes == 2 * student + 3 * 14 * (student + teacher)


def test_a_cache_of_the_top_k_grows_with_k(tmp_path: Path) -> None:
    sizes = [
        estimates(_plan(REPO / "recipes/toy/cached.yaml", tmp_path, *_top_k(k)))["cache_teacher"].disk_bytes
        for k in (64, 128)
    ]
    assert sizes[1] / sizes[0] == pytest.approx((4 * 128 + 3) / (4 * 64 + 3))


def _top_k(k: int) -> list[str]:
    sparse = f"{{kind: top_k, k: {k}}}"
    return [f"stages.cache_teacher.sparse={sparse}", f"stages.distill.loss.logits.sparse={sparse}"]


def test_held_out_loss_is_planned_for_its_own_batch(tmp_path: Path) -> None:
    found = [
        estimates(_plan(MINITRON_4B, tmp_path, DGX_32, f"execution.parallel.micro_batch_size={size}"))
        for size in (1, 4)
    ]
    one, four = (some["evaluate_teacher"].memory.activations for some in found)
    assert one == four


def test_a_validation_is_planned_for_its_own_batch() -> None:
    """Four sequences of 8,192 tokens, however small the micro-batches are; with recomputation they need the most."""
    layout = Parallel(tp=8, sequence_parallel=True, recompute="full")
    work = replace(_minitron_4b(layout, global_batch_size=8).work, on_gpu=True)
    planned, without = memory_of(work), memory_of(replace(work, validates=False))
    teacher = work.teacher
    assert teacher is not None
    tokens = 4 * 8192
    # They hold in bf16: state, norm, input and output of an MLP of the teacher, and the states before its output layer.
    assert planned.activations == 2 * tokens * (3 * teacher.hidden_size + 4 * teacher.ffn_hidden_size // 8)
    assert planned.loss > 2 * tokens * teacher.hidden_size
    assert planned.fixed == without.fixed
    assert planned.peak > without.peak + GIB
    assert memory_of(replace(work, parallel=Parallel(tp=8, micro_batch_size=4))).peak > planned.peak


def test_long_sequences_are_measured_in_batches_that_a_micro_batch_of_one_pays_for() -> None:
    assert [heldout_batch_size(length) for length in (128, 8192, 8193, 16384, 32768, 131072)] == [4, 4, 3, 2, 1, 1]
    work = replace(_minitron_4b(Parallel(), seq_len_tokens=32768, global_batch_size=8).work, on_gpu=True)
    assert memory_of(work) == memory_of(replace(work, validates=False))


def test_an_evaluation_with_tasks_needs_the_whole_model_on_each_process(tmp_path: Path) -> None:
    found = [
        estimates(_plan(MINITRON_4B, tmp_path, DGX_32, f"stages.evaluate_teacher.tasks={tasks}", NO_PROMPTS))
        for tasks in ("[]", "[arc_easy]")
    ]
    without, with_tasks = (some["evaluate_teacher"].memory for some in found)
    assert without.weights == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-3)
    assert with_tasks.weights == 2 * 8_030_261_248


def test_the_hours_say_which_stages_also_run_tasks(tmp_path: Path, minitron: Cli) -> None:
    keys = [f"execution.run_root={tmp_path}", "stages.evaluate_teacher.tasks=[arc_easy]"]
    output = " ".join(minitron("plan", TOY, *keys)[1].split())
    assert "without the tasks of evaluate_teacher" in output


def test_a_laptop_uses_no_gpu_hours_and_a_cache_has_a_size(tmp_path: Path) -> None:
    found = estimates(_plan(REPO / "recipes/toy/cached.yaml", tmp_path))
    assert all(estimate.gpu_hours == 0 for estimate in found.values())
    assert found["cache_teacher"].disk_bytes > 0
    assert found["distill"].memory.teacher == 0, "it is read from the cache"
    assert found["score"].memory.optimizer == 0


def test_alignment_and_candidates_are_counted(tmp_path: Path) -> None:
    aligned = estimates(_plan(REPO / "recipes/toy/aligned.yaml", tmp_path))
    assert aligned["dpo"].memory.teacher == aligned["sft"].memory.weights, "the reference"
    searched = estimates(_plan(REPO / "recipes/toy/search.yaml", tmp_path))
    assert any(name.startswith("search_") for name in searched)


def test_an_alignment_keeps_activations_of_all_micro_batches_in_flight(tmp_path: Path) -> None:
    shape = model_shape(load_recipe(MINITRON_4B), "teacher")
    assert shape is not None

    def activations(batch: int, pp: int, dp: int = 1, **keys: Any) -> float:
        return memory_of(alignment_load(shape, 10, batch, 4096, Parallel(pp=pp, dp=dp), **keys).work).activations / GIB

    # The first of pp stages has 1 / pp of the layers, and pp micro-batches in flight.
    assert activations(128, 4) == pytest.approx(activations(128, 1), rel=0.02)
    assert activations(2, 4, dp=2) == pytest.approx(activations(128, 4) / 4, rel=0.02), "one micro-batch on each rank"
    pairs = {"answers_per_row": 2, "has_reference": True}
    assert activations(4, 4, **pairs) == pytest.approx(2 * activations(4, 4), rel=0.02)
    assert activations(128, 4, **pairs) == pytest.approx(2 * activations(128, 4), rel=0.02)


def test_a_row_of_a_ranking_has_two_answers(tmp_path: Path) -> None:
    recipe = REPO / "recipes/toy/reinforce_model.yaml"
    found = [
        estimates(_plan(recipe, tmp_path, f"stages.attribute_model.reward={reward}"))["attribute_model"]
        for reward in ("regression", "ranking")
    ]
    assert found[1].tokens == 2 * found[0].tokens
    assert found[1].memory.activations > 1.9 * found[0].memory.activations
    assert found[1].memory.teacher == 0


def test_a_training_on_rewards_reads_each_answer_once(tmp_path: Path) -> None:
    found = estimates(_plan(REPO / "recipes/toy/reinforce.yaml", tmp_path))["reinforce"]
    steps, prompts, answers, longest = 16, 16, 4, 256
    assert found.tokens == steps * prompts * answers * longest
    assert found.memory.teacher > 0, "the reference policy"


def test_plan_shows_the_estimates_and_prints_them_as_json(
    tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, output = minitron("plan", TOY, f"execution.run_root={tmp_path}")
    assert code == 0
    assert "what it takes on CPU" in output
    assert "…" not in output[output.index("GiB of a process") :], "no figure is cut"
    assert "Assumed: 0.15 TFLOPS of each process, MFU 50%" in output
    facts = json.loads(minitron("plan", TOY, f"execution.run_root={tmp_path}", "--json")[1])["resources"]
    assert facts["stages"]["distill"]["memory"]["peak_gib"] > 0
    assert set(facts["totals"]) == {"hours", "gpu_hours", "cost", "disk_gib"}


def test_disk_space_includes_shards_and_joined_datasets(tmp_path: Path) -> None:
    text = tmp_path / "x.jsonl"
    text.write_text('{"text": "a"}\n')
    before = resource_facts(_plan(TOY, tmp_path))["totals"]["disk_gib"]
    toy_bytes = next((REPO / "nemo_minitron/toy").glob("text*")).stat().st_size
    packed = tmp_path / "folder" / "x.JSON.GZ"
    packed.parent.mkdir()
    packed.write_bytes(b"x" * 1000)
    for source, num_bytes in ((text, text.stat().st_size), (packed, 4000), (packed.parent, 4000)):
        plan = _plan(TOY, tmp_path, f"stages.data.sources=[{{source: {source}}}]")
        found = resource_facts(plan)["totals"]["disk_gib"] - before
        assert found * 2**30 == pytest.approx(2 * num_bytes - 2 * 4 * toy_bytes), source
