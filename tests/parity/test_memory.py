"""The planned memory against that of real distillation steps on this machine, in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.distillation import linear
from nemo_minitron.distillation.chunks import chunk_tokens
from nemo_minitron.families import ModelShape, num_params, read_shape
from nemo_minitron.families.split import params_of_rank
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.workload.memory import layer_bytes_per_token, memory_of
from nemo_minitron.workload.work import Work
from tests.conftest import REPO
from tests.support.memory_child import FIXED_THRESHOLDS
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024}
WIDE = {**SIZES, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192}
DEEP = {**SIZES, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 20, "vocab_size": 4096}
CASES: dict[str, dict[str, Any]] = {
    "wide": {"family": "llama31_rope", "student": WIDE, "seq": 512, "micro": 4, "precision": "bf16"},
    "deep_fp32": {"family": "llama31_rope", "student": DEEP, "seq": 256, "micro": 4, "precision": "fp32"},
    "tied_large_vocabulary": {
        "family": "llama_gqa_tied",
        "student": {**WIDE, "num_hidden_layers": 4, "vocab_size": 49152},
        "seq": 256,
        "micro": 4,
        "precision": "bf16",
    },
    "squared_relu": {"family": "nemotron", "student": WIDE, "seq": 512, "micro": 2, "precision": "bf16"},
    "recompute": {"family": "llama31_rope", "student": DEEP, "seq": 512, "micro": 4, "precision": "bf16", "full": True},
    "qk_norm_long": {
        "family": "qwen3",
        "student": {**WIDE, "head_dim": 64, "num_hidden_layers": 6},
        "seq": 1024,
        "micro": 2,
        "precision": "bf16",
    },
}
FAST = "wide"


def _measure(case: dict[str, Any], folder: Path) -> tuple[dict[str, int], ModelShape, ModelShape]:
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    teacher_sizes = {**case["student"], "num_hidden_layers": case["student"]["num_hidden_layers"] + 2}
    student = tiny_model_dir(folder / "student", case["family"], dtype=dtype, **case["student"])
    teacher = tiny_model_dir(folder / "teacher", case["family"], dtype=dtype, seed=1, **teacher_sizes)
    data = tiny_data_dir(folder / "data", num_documents=400)
    params = {"kind": case.get("kind", "distill"), "num_steps": 4, "lr": 1e-4, "global_batch_size": case["micro"]}
    params |= {"seq_len_tokens": case["seq"], "precision": case["precision"], "valid_num_tokens": case["seq"]}
    parallel = {"micro_batch_size": case["micro"], "recompute": "full" if case.get("full") else "none"}
    order = {"params": params, "parallel": parallel, "work": str(folder / "work")}
    order |= {"student": str(student), "teacher": str(teacher), "data": str(data)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory_child", json.dumps(order)],
        cwd=REPO,
        env={**os.environ, **FIXED_THRESHOLDS, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shapes = [
        read_shape(json.loads((path / "config.json").read_text()), where=str(path)) for path in (student, teacher)
    ]
    return json.loads(done.stdout.splitlines()[-1]), shapes[0], shapes[1]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in CASES])
def test_the_memory_of_a_distillation_is_the_planned_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    measured, student, teacher = _measure(case, tmp_path)
    layout = Parallel(micro_batch_size=case["micro"], recompute="full" if case.get("full") else "none")
    planned = memory_of(Work(student, layout, case["precision"], case["seq"], teacher=teacher))
    figures = {"planned": planned.facts(), "measured": {key: value / 2**30 for key, value in measured.items()}}
    print(name, json.dumps(figures))
    assert planned.fixed == pytest.approx(measured["fixed"], rel=0.02), figures
    assert planned.peak == pytest.approx(measured["peak"], rel=0.15), figures


def test_the_memory_of_a_layer_local_distillation_is_the_planned_one(tmp_path: Path) -> None:
    case = {**CASES["deep_fp32"], "kind": "distill_layers"}
    measured, student, teacher = _measure(case, tmp_path)
    layout = Parallel(micro_batch_size=case["micro"])
    planned = memory_of(Work(student, layout, case["precision"], case["seq"], teacher=teacher, layerwise=True))
    figures = {"planned": planned.facts(), "measured": {key: value / 2**30 for key, value in measured.items()}}
    print(json.dumps(figures))
    assert planned.fixed == pytest.approx(measured["fixed"], rel=0.02), figures
    # The heads run in validations only.
    assert planned.peak - planned.loss == pytest.approx(measured["peak"], rel=0.15), figures


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2])
def test_ranks_have_all_parameters_between_them(tp: int, pp: int) -> None:
    shape = _shape()
    stages = [params_of_rank(shape, tp=tp, pp=pp, stage=stage) for stage in range(pp)]
    if tp == 1:
        assert sum(stages) == num_params(shape)
    assert sum(stages) * tp >= num_params(shape)
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    assert sum(stages) * tp == num_params(shape) + (tp - 1) * norms


def test_the_chunks_are_those_of_the_loss() -> None:
    head = linear.Head(torch.empty(1000, 8), torch.empty(16, 8))
    assert head.chunk_tokens == chunk_tokens(1000, on_gpu=False)


def test_layouts_and_recomputation_save_the_expected_memory() -> None:
    shape = _shape()
    plain = memory_of(Work(shape, Parallel(), "bf16", 512))
    split = memory_of(Work(shape, Parallel(tp=2), "bf16", 512))
    sharded = memory_of(Work(shape, Parallel(dp=4, distributed_optimizer=True), "bf16", 512))
    again = memory_of(Work(shape, Parallel(recompute="full"), "bf16", 512))
    assert split.weights == pytest.approx(plain.weights / 2, rel=0.01)
    assert sharded.optimizer == pytest.approx(plain.optimizer / 4, abs=4)
    assert again.activations < plain.activations / 2
    needed = memory_of(Work(shape, Parallel(), "bf16", 512, trains=False))
    assert (needed.gradients, needed.optimizer) == (0, 0)
    assert layer_bytes_per_token(shape, Parallel(tp=2, sequence_parallel=True), "bf16") == pytest.approx(
        layer_bytes_per_token(shape, Parallel(), "bf16") / 2, rel=0.001
    )


def _shape() -> ModelShape:
    keys = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512}
    keys |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1024, "max_position_embeddings": 512}
    keys |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"}
    return read_shape({**keys, "architectures": ["LlamaForCausalLM"]}, where="test")
