"""The recipes of published models plan students of exactly the published shapes, summed up by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.plan.checks import find_problems
from nemo_minitron.plan.describe import plan_facts
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.stages.distill.params import DistillStage
from tests.conftest import REPO

NO_FILES = ("there is no such file or folder.", "matches no file.")
# Heads of 128 in all of them, and 8 query groups, so k and v have 8 * 128 = 1024 rows.
_LLAMA_LAYER = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096
"""q and o, k and v, gate and up and down, two RMSNorms."""
_NEMOTRON_TEACHER_LAYER = 2 * 6144 * 6144 + 2 * 1024 * 6144 + 2 * 24576 * 6144 + 2 * (6144 + 6144)
"""q and o, k and v, up and down (no gate), two LayerNorms with weight and bias."""

# recipe -> (teacher, student): input and output embeddings + layers + final norm. In a student q and o keep the
# rows of whole heads: 32 * 128 = 4096 (Llama, Mistral, Qwen), 48 * 128 = 6144 or 24 * 128 = 3072 (Nemotron).
BY_HAND = {
    "llama31_8b/width_4b": (
        2 * 128256 * 4096 + 32 * _LLAMA_LAYER + 4096,
        2 * 128256 * 3072 + 32 * (2 * 4096 * 3072 + 2 * 1024 * 3072 + 3 * 9216 * 3072 + 2 * 3072) + 3072,
    ),
    "llama31_8b/depth_4b": (
        2 * 128256 * 4096 + 32 * _LLAMA_LAYER + 4096,
        2 * 128256 * 4096 + 16 * _LLAMA_LAYER + 4096,
    ),
    "mistral_nemo_12b/width_8b": (
        2 * 131072 * 5120 + 40 * (2 * 4096 * 5120 + 2 * 1024 * 5120 + 3 * 14336 * 5120 + 2 * 5120) + 5120,
        2 * 131072 * 4096 + 40 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 11520 * 4096 + 2 * 4096) + 4096,
    ),
    "nemotron4_15b/width_8b": (
        2 * 256000 * 6144 + 32 * _NEMOTRON_TEACHER_LAYER + 2 * 6144,
        2 * 256000 * 4096 + 32 * (2 * 6144 * 4096 + 2 * 1024 * 4096 + 2 * 16384 * 4096 + 4 * 4096) + 2 * 4096,
    ),
    "nemotron4_15b/width_4b": (
        2 * 256000 * 6144 + 32 * _NEMOTRON_TEACHER_LAYER + 2 * 6144,
        2 * 256000 * 3072 + 32 * (2 * 3072 * 3072 + 2 * 1024 * 3072 + 2 * 9216 * 3072 + 4 * 3072) + 2 * 3072,
    ),
    # Qwen3 also has a norm of 128 for the queries and one for the keys, in each layer.
    "qwen3_8b/width_6b": (
        2 * 151936 * 4096 + 36 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 12288 * 4096 + 2 * 4096 + 2 * 128) + 4096,
        2 * 151936 * 3584 + 36 * (2 * 4096 * 3584 + 2 * 1024 * 3584 + 3 * 9216 * 3584 + 2 * 3584 + 2 * 128) + 3584,
    ),
}
EXACT = {
    "llama31_8b/width_4b": 4_512_746_496,
    "llama31_8b/depth_4b": 4_540_469_248,
    "mistral_nemo_12b/width_8b": 8_414_105_600,
    "nemotron4_15b/width_8b": 8_271_699_968,
    "nemotron4_15b/width_4b": 4_190_509_056,
    "qwen3_8b/width_6b": 5_977_809_408,
}
TOKENS = {
    "llama31_8b/width_4b": 94e9,
    "llama31_8b/depth_4b": 94e9,
    "mistral_nemo_12b/width_8b": 380e9,
    "nemotron4_15b/width_8b": 94e9,
    "nemotron4_15b/width_4b": 94e9,
    "qwen3_8b/width_6b": 80e9,
}


def _plan(name: str, tmp_path: Path, *more: str) -> RunPlan:
    return load_plan(REPO / f"recipes/{name}.yaml", [f"execution.run_root={tmp_path}", *more], checked=False)


@pytest.mark.parametrize("name", BY_HAND)
def test_teacher_and_student_have_the_sizes_worked_out_by_hand(name: str, tmp_path: Path) -> None:
    facts = plan_facts(_plan(name, tmp_path))
    assert (facts["teacher"]["num_params"], facts["student"]["num_params"]) == BY_HAND[name]
    assert facts["student"]["num_params"] == EXACT[name]


@pytest.mark.parametrize("name", BY_HAND)
def test_the_steps_are_the_fewest_that_read_the_published_tokens(name: str, tmp_path: Path) -> None:
    distill = _plan(name, tmp_path).recipe.stages["distill"]
    assert isinstance(distill, DistillStage)
    tokens_per_step = distill.global_batch_size * distill.seq_len_tokens
    assert TOKENS[name] <= distill.num_steps * tokens_per_step < TOKENS[name] + tokens_per_step


@pytest.mark.parametrize("num_nodes", [1, 16, 32])
@pytest.mark.parametrize("name", BY_HAND)
def test_the_layout_fits_one_node_and_as_many_as_the_papers_had(name: str, num_nodes: int, tmp_path: Path) -> None:
    of_one_node = _plan(name, tmp_path).recipe.execution.parallel
    assert of_one_node.world_size == 8
    many = of_one_node.model_copy(update={"dp": of_one_node.dp * num_nodes})
    # The recipes advise this: on many nodes the training alone gets the larger layout.
    plan = _plan(name, tmp_path, f"execution.parallel_by_stage.distill={json.dumps(many.model_dump())}")
    assert plan.call("distill").parallel.world_size == 8 * num_nodes
    assert [problem for problem in find_problems(plan) if not problem.endswith(NO_FILES)] == []


def test_by_depth_the_papers_contiguous_block_is_dropped_and_the_last_layer_stays(tmp_path: Path) -> None:
    select = _plan("llama31_8b/depth_4b", tmp_path).call("select")
    assert [layer for layer in range(32) if layer not in select.params["drop_layers"]] == [*range(15), 31]


# 2407.14679, table 19: the 15 candidates near 8B (layers, heads, MLP dim, embedding).
TABLE_19 = {
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096), (31, 32, 12800, 5120),
    (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096), (30, 32, 12800, 5120), (30, 32, 16128, 4608),
    (30, 48, 13824, 4608), (30, 48, 16384, 4096), (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip


def _nemotron_by_hand(layers: int, heads: int, ffn: int, hidden: int) -> int:
    layer = 2 * heads * 128 * hidden + 2 * 1024 * hidden + 2 * ffn * hidden + 2 * 2 * hidden
    return 2 * 256000 * hidden + layers * layer + 2 * hidden


def _points(facts: dict) -> dict[tuple[int, int, int, int], int]:
    keys = ("num_layers", "num_attention_heads", "ffn_hidden_size", "hidden_size")
    return {tuple(found[key] for key in keys): found["num_params"] for found in facts["candidates"]}


def test_the_search_near_8b_has_the_15_candidates_of_the_papers_table(tmp_path: Path) -> None:
    points = _points(plan_facts(_plan("nemotron4_15b/search_8b", tmp_path)))
    assert points == {point: _nemotron_by_hand(*point) for point in TABLE_19}


def test_the_search_near_4b_has_the_18_candidates_that_the_paper_counts(tmp_path: Path) -> None:
    plan = _plan("nemotron4_15b/search_4b", tmp_path)
    points = _points(plan_facts(plan))
    grid = itertools.product((29, 30, 31, 32), (24, 32, 48), (2.5, 3, 3.5, 4), (2560, 3072, 3584, 4096, 4608))
    sizes = [(layers, heads, int(factor * hidden), hidden) for layers, heads, factor, hidden in grid]
    by_hand = {point: _nemotron_by_hand(*point) for point in sizes}
    assert points == {point: size for point, size in by_hand.items() if 3.8e9 <= size <= 4.2e9}
    assert len(points) == 18
    assert points[32, 24, 9216, 3072] == EXACT["nemotron4_15b/width_4b"], "Minitron 4B is one of them"
    assert sum(call.kind == "candidate" for call in plan.calls) == 18, "each is a stage of its own"
