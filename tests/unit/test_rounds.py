"""Rounds of a step: their sizes, and the memory that the planner counts."""

from __future__ import annotations

import pytest

from nemo_minitron.distillation.rounds import round_size, round_sizes
from nemo_minitron.families import ModelShape, read_shape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.workload.memory import Memory, memory_of
from nemo_minitron.workload.work import Work


@pytest.mark.parametrize(("pp", "live", "learns", "largest"), [
    (1, True, False, None), (1, True, True, 1), (1, False, False, None),
    (4, True, False, 32), (4, True, True, 32), (4, False, False, None),
])  # fmt: skip
def test_only_a_teacher_with_a_schedule_of_its_own_needs_rounds(
    pp: int, live: bool, learns: bool, largest: int | None
) -> None:
    assert round_size(pp, teacher_is_live=live, teacher_learns=learns) == largest


@pytest.mark.parametrize("number", [1, 2, 31, 32, 33, 100, 1152])
@pytest.mark.parametrize("largest", [None, 1, 8, 32])
def test_rounds_cover_a_step_in_nearly_equal_parts(number: int, largest: int | None) -> None:
    sizes = round_sizes(number, largest)
    assert sum(sizes) == number
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= (largest or number)
    assert len(sizes) == (1 if largest is None else -(-number // largest))


def _memory(parallel: Parallel, num_micro_batches: int, *, learns: bool = False, pairs: int = 0) -> Memory:
    return memory_of(
        Work(
            _SHAPE, parallel, "bf16", 8192, num_micro_batches, teacher=_SHAPE, teacher_learns=learns, hidden_pairs=pairs
        )
    )


_EACH = 8192 * 4096 * 2
"""Bytes of the input of the teacher's output layer in one micro-batch: 64 MiB."""


@pytest.mark.parametrize("learns", [False, True])
def test_the_plan_counts_the_targets_of_a_round(learns: bool) -> None:
    layout = Parallel(pp=2, recompute="full")
    few, many = (_memory(layout, number, learns=learns) for number in (4, 16))
    assert many.loss - few.loss == 12 * _EACH, "the last stage needs the most"
    assert _memory(layout, 1152, learns=learns).peak == many.peak
    assert _memory(Parallel(), 1152, learns=learns).peak == _memory(Parallel(), 1, learns=learns).peak


def test_the_plan_counts_the_teachers_states_of_a_round_on_their_stages() -> None:
    few, many = (_memory(Parallel(pp=4), number, pairs=8) for number in (8, 32))
    assert many.hidden_states - few.hidden_states == 24 * 2 * _EACH


def test_the_activations_of_a_teacher_that_learns_count() -> None:
    small = _SHAPE.resized(ffn_hidden_size=1024)
    work = Work(small, Parallel(), "bf16", 8192, teacher=_SHAPE, teacher_learns=True)
    alone = memory_of(Work(_SHAPE, Parallel(), "bf16", 8192))
    assert memory_of(work).activations == alone.activations


def _shape() -> ModelShape:
    keys = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
    keys |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    keys |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"}
    return read_shape({**keys, "architectures": ["LlamaForCausalLM"]}, where="test")


_SHAPE = _shape()
