"""Depth metrics computed by hand, and the pipeline stages of layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nemo_minitron.errors import PlanError
from nemo_minitron.families.split import stage_bounds
from nemo_minitron.pruning.depth import Removal, Run, lm_loss, logit_mse, runs_of, task_error

NLL = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])


def _removal(**keys: Any) -> Removal:
    logits = torch.zeros(2, 3, 4)
    given = {"logits": logits, "whole": logits, "nll": NLL, "loss_mask": MASK, "answer": None}
    return Removal(**{**given, "vocab_sum": lambda x: x, **keys})


def test_lm_loss_is_the_mean_over_the_tokens_that_count() -> None:
    metric = lm_loss()
    total = metric.sums(_removal())
    assert total.tolist() == [1 + 2 + 4 + 5, 4]
    assert metric.importance(total + total) == 3.0, "sums of batches add up"


def test_logit_mse_is_the_mean_over_tokens_and_vocabulary() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1], logits[1, 2, 3], logits[0, 2, 0] = 2.0, -4.0, 100.0  # the last one is masked
    metric = logit_mse(vocab_size=4)
    assert metric.importance(metric.sums(_removal(logits=logits))) == (4 + 16) / (4 * 4)
    # Two ranks with half of the vocabulary each: the squares are added up, the count is not.
    halves = [_removal(logits=logits[..., part], whole=torch.zeros(2, 3, 2)) for part in (slice(0, 2), slice(2, 4))]
    squares = [((half.logits) ** 2).sum(-1) for half in halves]
    whole = Removal(halves[0].logits, halves[0].whole, NLL, MASK, None, vocab_sum=lambda _: squares[0] + squares[1])
    assert metric.importance(metric.sums(whole)) == 20 / 16


def test_a_task_gets_the_summed_log_likelihood_of_each_answer() -> None:
    seen = []

    def accuracy(log_likelihoods: torch.Tensor) -> float:
        seen.append(log_likelihoods.tolist())
        return 0.75

    metric = task_error(3, accuracy)
    first = metric.sums(_removal(answer=torch.tensor([2, 0])))
    second = metric.sums(_removal(nll=NLL[:1], loss_mask=MASK[:1], answer=torch.tensor([1])))
    assert metric.importance(first + second) == 0.25
    assert seen == [[-9.0, -3.0, -3.0]]


def test_runs_are_all_neighbours_of_a_length() -> None:
    assert [(run.start, run.stop) for run in runs_of(4, 3)] == [(0, 3), (1, 4)]
    assert runs_of(3, 1) == [Run(0), Run(1), Run(2)]


@pytest.mark.parametrize("num_layers", [1, 5, 30, 31, 32])
def test_every_layer_has_one_pipeline_stage_and_no_stage_is_empty(num_layers: int) -> None:
    for pp in range(1, num_layers + 1):
        bounds = stage_bounds(num_layers, pp)
        assert len(bounds) == pp
        assert [layer for start, stop in bounds for layer in range(start, stop)] == list(range(num_layers))
        assert min(stop - start for start, stop in bounds) >= 1
        if pp > 2:  # Megatron requires equal stages, except the first and the last
            assert len({stop - start for start, stop in bounds[1:-1]}) == 1
    with pytest.raises(PlanError, match="cannot be spread"):
        stage_bounds(num_layers, num_layers + 1)


def test_stages_that_hold_the_embeddings_or_the_head_get_fewer_layers() -> None:
    assert [stop - start for start, stop in stage_bounds(30, 4)] == [7, 8, 8, 7]
    assert math.ceil(30 / 4) == 8
