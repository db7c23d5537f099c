"""Choice of the inputs that stay when least squares repairs the layer afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.pruning import reconstruction
from nemo_minitron.pruning.reconstruction import (
    Readers,
    _schur,
    best_in_groups,
    greedy_order,
    obs_order,
    remaining_error,
    swapped,
)

SIZE = 10


def _layer(size: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (inputs [N, F], weight [O, F])."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(500, size, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(7, size, generator=generator, dtype=torch.float64)
    return inputs, weight


def _readers(inputs: Tensor, weight: Tensor) -> list[Readers]:
    return [Readers(inputs.T @ inputs, weight.T @ weight)]


@pytest.fixture(autouse=True)
def almost_no_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction.damped, "__defaults__", (1e-12,))


def _error_on_raw_inputs(inputs: Tensor, weight: Tensor, kept: list[int]) -> float:
    wanted = inputs @ weight.T
    if not kept:
        return float(wanted.square().sum())
    solution = torch.linalg.lstsq(inputs[:, kept], wanted).solution
    return float((wanted - inputs[:, kept] @ solution).square().sum())


@pytest.mark.parametrize("kept", [[0], [1, 4, 7], list(range(9))])
def test_the_remaining_error_is_that_of_least_squares_on_raw_inputs(kept: list[int]) -> None:
    inputs, weight = _layer()
    expected = _error_on_raw_inputs(inputs, weight, kept) / _error_on_raw_inputs(inputs, weight, [])
    assert remaining_error(_readers(inputs, weight), kept) == pytest.approx(expected, rel=1e-6)


def test_greedy_adds_the_input_that_lowers_the_error_most() -> None:
    inputs, weight = _layer()
    kept: list[int] = []
    for found in greedy_order(_readers(inputs, weight)):
        rest = [j for j in range(SIZE) if j not in kept]
        assert found == min(rest, key=lambda j: _error_on_raw_inputs(inputs, weight, [*kept, j]))
        kept.append(found)


def test_obs_removes_the_input_that_raises_the_error_least() -> None:
    inputs, weight = _layer()
    kept = list(range(SIZE))
    for found in reversed(obs_order(_readers(inputs, weight))):
        assert found == min(kept, key=lambda j: _error_on_raw_inputs(inputs, weight, [k for k in kept if k != j]))
        kept.remove(found)


def test_inputs_of_several_layers_are_chosen_for_all_of_them() -> None:
    layers = [_layer(seed=seed) for seed in range(3)]
    readers = [some for layer in layers for some in _readers(*layer)]

    def error(kept: list[int]) -> float:
        return sum(_error_on_raw_inputs(*layer, kept) / _error_on_raw_inputs(*layer, []) for layer in layers)

    assert greedy_order(readers)[0] == min(range(SIZE), key=lambda j: error([j]))
    whole = list(range(SIZE))
    assert obs_order(readers)[-1] == min(whole, key=lambda j: error([k for k in whole if k != j]))


@pytest.mark.parametrize("order", [greedy_order, obs_order])
@pytest.mark.parametrize(("block", "step"), [(2, 1), (1, 3), (2, 2)])
def test_blocks_stay_together_and_every_block_has_a_rank(
    order: Callable[..., list[int]], block: int, step: int
) -> None:
    assert sorted(order(_readers(*_layer()), block=block, step=step)) == list(range(SIZE // block))


@pytest.mark.parametrize("order", [greedy_order, obs_order])
def test_of_two_equal_inputs_one_goes_first(order: Callable[..., list[int]]) -> None:
    inputs, weight = _layer()
    inputs[:, 3] = inputs[:, 8]
    assert order(_readers(inputs, weight))[-1] in (3, 8)


@pytest.mark.parametrize("order", [greedy_order, obs_order])
def test_an_input_that_is_always_zero_goes_first(order: Callable[..., list[int]]) -> None:
    inputs, weight = _layer()
    inputs[:, 5] = 0.0
    assert order(_readers(inputs, weight))[-1] == 5


@pytest.mark.parametrize("seed", range(5))
def test_swaps_never_raise_the_error_and_end_where_no_swap_helps(seed: int) -> None:
    inputs, weight = _layer(seed=seed)
    readers, start = _readers(inputs, weight), [0, 1, 2, 3]
    found = swapped(readers, start)
    before, after = (_error_on_raw_inputs(inputs, weight, kept) for kept in (start, found))
    best = min(_error_on_raw_inputs(inputs, weight, list(kept)) for kept in combinations(range(SIZE), 4))
    assert best <= after * (1 + 1e-9) <= before * (1 + 1e-9)
    assert len(found) == len(set(found)) == 4
    assert swapped(readers, found) == found


@pytest.mark.parametrize("seed", range(5))
def test_heads_are_swapped_inside_their_query_group(seed: int) -> None:
    inputs, weight = _layer(size=12, seed=seed)
    readers, start = _readers(inputs, weight), [0, 1, 3, 4]  # of 6 heads of 2 channels, in 2 groups
    found = swapped(readers, start, block=2, groups=2)
    assert [sum(head // 3 == group for head in found) for group in (0, 1)] == [2, 2]
    channels = [[2 * head + place for head in heads for place in (0, 1)] for heads in (start, found)]
    before, after = (_error_on_raw_inputs(inputs, weight, kept) for kept in channels)
    assert after <= before * (1 + 1e-9)
    assert swapped(readers, found, block=2, groups=2) == found


def test_swaps_hold_one_intermediate_matrix_whatever_the_number_of_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden channels have two readers in each layer: with a matrix more for each, memory is half as much again."""
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def counted(*args: Any) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made) + 1)
        matrix = _schur(*args)
        made.append(weakref.ref(matrix))
        return matrix

    monkeypatch.setattr(reconstruction, "_schur", counted)
    swapped([reader for seed in range(6) for reader in _readers(*_layer(seed=seed))], [0, 1, 2, 3])
    assert len(made) >= 3 * 6, "at first, with each exchange, and after it"
    assert most == 1


def test_the_best_of_each_group_keep_their_order() -> None:
    assert best_in_groups([5, 4, 3, 0, 1, 2], 4, groups=2) == [0, 1, 5, 4]
    assert best_in_groups([5, 4, 3, 0, 1, 2], 4, groups=1) == [5, 4, 3, 0]
