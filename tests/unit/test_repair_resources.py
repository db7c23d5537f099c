"""Estimates of stages that hold one layer at a time, compared with calculations by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.distillation.flops import forward_flops_per_token, head_flops_per_token
from nemo_minitron.families import num_params, read_shape
from nemo_minitron.plan.resources.costs import estimates
from nemo_minitron.pruning.repairable import repaired_sites
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import Compensation, ReconstructionScoring
from nemo_minitron.workload.layer_by_layer import ranking_load, repair_load
from nemo_minitron.workload.memory import GIB, memory_of
from tests.conftest import REPO

LLAMA_70B = read_shape(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)


@pytest.mark.parametrize("mode", ["one_shot", "sequential"])
def test_a_repair_holds_one_layer_so_a_large_teacher_fits_on_one_gpu(mode: str) -> None:
    keys = Compensation.model_validate({"mode": mode})
    student = LLAMA_70B.resized(hidden_size=6144, ffn_hidden_size=20480)
    load = repair_load(LLAMA_70B, student, keys, repaired_sites(keys, LLAMA_70B, student), Parallel(dp=8))
    memory = memory_of(replace(load.work, on_gpu=True))
    assert memory.peak / GIB < 74.0, "what an H100 has"
    layers = (num_params(some) - 2 * some.vocab_size * some.hidden_size for some in (LLAMA_70B, student))
    assert memory.weights == pytest.approx(4 * sum(layers) / 80, rel=1e-4)
    # On a CPU the streams of this process's text are in the same memory: both of the teacher, and the student's own.
    width = 2 * 8192 + (6144 if mode == "sequential" else 0)
    tokens = keys.num_samples * keys.seq_len_tokens + keys.heldout_tokens
    assert memory_of(load.work).peak - memory.peak == 4 * width * tokens / 8


def test_sums_passes_and_files_of_a_repair_by_hand() -> None:
    """Only down_proj: 20,480 of 28,672 neurons stay."""
    keys = Compensation(sites=("mlp_output",))
    student = LLAMA_70B.resized(ffn_hidden_size=20480)
    load = repair_load(LLAMA_70B, student, keys, ["mlp_output"], Parallel())
    sums = 20480**2 + 8192 * 20480 + 8192
    solving = 7 * 8192 * 20480 + 2 * 20480**2
    update = 8192 * 20480
    assert memory_of(load.work).sums == 8 * (2 * sums + solving + update) + 4 * 8192 * (28672 + 20480)
    one_pass = forward_flops_per_token(LLAMA_70B, 512) - head_flops_per_token(LLAMA_70B)
    assert load.flops_per_token == pytest.approx(one_pass + 80 * 2 * sums)
    linear = num_params(student) - 2 * 128256 * 8192 - (2 * 80 + 1) * 8192
    assert load.work.one_layer is not None
    assert load.work.one_layer.disk == 2 * num_params(student), "its output"
    assert load.work_bytes == 2 * linear, "files of finished layers"
    twice = repair_load(LLAMA_70B, student, keys.model_copy(update={"mode": "sequential"}), ["mlp_output"], Parallel())
    student_pass = forward_flops_per_token(student, 512) - head_flops_per_token(student)
    assert twice.flops_per_token == pytest.approx(one_pass + 2 * student_pass + 80 * 2 * sums)


def test_a_sequential_repair_of_all_sites_runs_attention_three_times_and_the_mlp_less_often() -> None:
    student = LLAMA_70B.resized(ffn_hidden_size=20480)
    keys = Compensation(mode="sequential")
    load = repair_load(LLAMA_70B, student, keys, keys.sites[:4], Parallel())
    mlp = [6 * 80 * 8192 * ffn for ffn in (28672, 20480)]
    whole = [forward_flops_per_token(shape, 512) - head_flops_per_token(shape) for shape in (LLAMA_70B, student)]
    attention = whole[0] - mlp[0]
    assert attention == pytest.approx(whole[1] - mlp[1])
    # Inputs and outputs of queries, keys and values; of o_proj; of gate and up; of down_proj.
    sums = [8192**2 * 3, 8192**2 * 2 + 8192, 8192**2 * 3, 20480**2 + 8192 * 20480 + 8192]
    passes = 3 * attention + mlp[0] + 4 * attention + 2 * mlp[1]
    assert load.flops_per_token == pytest.approx(passes + 80 * 2 * sum(sums))


def test_ranking_for_a_repair_needs_the_moments_of_all_layers_in_host_memory_and_on_disk(tmp_path: Path) -> None:
    load = ranking_load(LLAMA_70B, ReconstructionScoring(), Parallel())
    on_gpu, on_cpu = (memory_of(replace(load.work, on_gpu=on_gpu)) for on_gpu in (True, False))
    assert on_gpu.sums == 8 * (2 * 8192**2 + 8192**2 + 28672**2)
    assert on_cpu.sums - on_gpu.sums > 32 * 80 * 8192**2
    assert load.work_bytes == 32 * 80 * 8192**2
    found = estimates(load_plan(REPO / "recipes/toy/compensated.yaml", [f"execution.run_root={tmp_path}"]))
    assert found["score"].disk_bytes == 32 * 4 * 64**2
    assert found["compensate"].disk_bytes > 2 * 147_448
    assert found["compensate"].memory.sums > 0
