"""The guard that stops a training with a loss spike."""

from __future__ import annotations

import pytest

from nemo_minitron.backends.megatron.training.guard import LossWatch
from nemo_minitron.schema.training import LossGuard

RULES = LossGuard(max_ratio=2.0, window_steps=10, patience_steps=3)


def _spikes(watch: LossWatch, losses: list[float]) -> list[bool]:
    return [watch.is_spike(loss) for loss in losses]


def test_the_third_loss_in_a_row_above_the_bound_is_a_spike() -> None:
    watch = LossWatch(RULES, [1.0] * 10)
    assert _spikes(watch, [2.1, 2.1, 2.1]) == [False, False, True]


def test_one_good_loss_between_starts_the_count_again() -> None:
    watch = LossWatch(RULES, [1.0] * 10)
    assert not any(_spikes(watch, [2.1, 2.1, 1.9, 2.1, 2.1]))
    assert not watch.last_loss_is_good


def test_a_loss_at_the_bound_is_good() -> None:
    watch = LossWatch(RULES, [1.0] * 10)
    assert not any(_spikes(watch, [2.0] * 5))
    assert watch.last_loss_is_good


@pytest.mark.parametrize("usual", [0.0, -0.02, 1e-6])
def test_losses_near_zero_may_multiply(usual: float) -> None:
    """A sampled KL can be estimated as negative, and a student that equals its teacher starts at zero."""
    watch = LossWatch(RULES, [usual] * 10)
    assert not any(_spikes(watch, [0.05] * 5))
    assert _spikes(LossWatch(RULES, [usual] * 10), [0.5] * 3) == [False, False, True]


def test_nine_steps_give_no_bound_and_the_tenth_does() -> None:
    watch = LossWatch(RULES, [1.0] * 9)
    assert watch.median is None
    assert not any(_spikes(watch, [1.0]))
    assert watch.median == 1.0
    assert _spikes(watch, [9.0] * 3) == [False, False, True]


def test_losses_above_the_bound_do_not_raise_it() -> None:
    watch = LossWatch(RULES, [1.0] * 10)
    _spikes(watch, [9.0, 9.0, 1.0])
    assert watch.good_losses == [1.0] * 10
    assert watch.median == 1.0


def test_only_the_window_counts() -> None:
    watch = LossWatch(RULES, [8.0] * 10)
    _spikes(watch, [1.0] * 6)
    assert watch.median == 1.0
    assert watch.good_losses == [8.0] * 4 + [1.0] * 6


def test_a_watch_made_from_a_checkpoint_decides_as_the_first_one_would() -> None:
    losses = [5.0 - 0.3 * step for step in range(12)]
    first = LossWatch(RULES)
    _spikes(first, losses)
    again = LossWatch(RULES, first.good_losses)
    after = [4.0, 3.7, 1.0, 8.0, 8.0, 8.0]
    assert _spikes(again, after) == _spikes(first, after)


def test_without_rules_nothing_is_a_spike() -> None:
    watch = LossWatch(None)
    assert not any(_spikes(watch, [1.0] * 10 + [1e9] * 10))
    assert watch.last_loss_is_good


@pytest.mark.parametrize("wrong", [{"max_ratio": 1.0}, {"window_steps": 9}, {"patience_steps": 0}])
def test_rules_that_could_never_hold_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossGuard(**wrong)
