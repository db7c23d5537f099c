"""Importance scores, compared with numbers computed by hand and in fp64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.importance import (
    Aggregation,
    aggregate_batch,
    aggregate_sequence,
    batch_sums,
    block_influence,
    block_influence_sums,
    head_scores,
)
from nemo_minitron.pruning.magnitude import magnitude_scores
from nemo_minitron.schema.pruning import Scoring, Selection
from tests.support.tiny_models import tiny_model_dir

HOW: tuple[Aggregation, ...] = ("mean", "l2", "var")
# Two tokens, one sample, three channels.
TWO_BY_THREE = torch.tensor([[1.0, -2.0, 3.0], [3.0, 2.0, -4.0]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [2.0, 2.0, 3.5]),  # (|1| + |3|) / 2, (|-2| + |2|) / 2, (|3| + |-4|) / 2
        ("l2", [math.sqrt(10.0), math.sqrt(8.0), 5.0]),  # no division by the number of items
        ("var", [1.0, 4.0, 12.25]),  # around the signed means 2, 0, -0.5; divided by n
    ],
)
def test_aggregations_of_a_two_by_three_case_by_hand(how: Aggregation, expected: list[float]) -> None:
    assert aggregate_sequence(TWO_BY_THREE[:, None], how).squeeze(0).tolist() == pytest.approx(expected)
    assert aggregate_batch(batch_sums(TWO_BY_THREE), how).tolist() == pytest.approx(expected)


def test_without_an_axis_and_block_influence_no_batch_is_read() -> None:
    from nemo_minitron.backends.megatron.scoring.stats import activation_scores

    batches = iter([{"tokens": torch.zeros(1, 4)}])
    unused: Any = None
    params = Scoring(width_axes=(), layer_metrics=("lm_loss",))
    assert activation_scores(unused, unused, batches, params, unused) == {}
    assert len(list(batches)) == 1


@pytest.mark.parametrize("largest", ["norms", "biases"])
def test_magnitude_counts_norms_and_biases(largest: str, tmp_path: Path) -> None:
    """All channels have the same matrices, so that only parameters with one dimension distinguish them."""
    folder = tiny_model_dir(tmp_path, "qwen2")
    file = folder / "model.safetensors"
    weights = {name: torch.ones_like(tensor) for name, tensor in load_file(file).items()}
    for name, tensor in weights.items():
        if largest == "norms" and name.endswith("layernorm.weight"):
            tensor[3] = 2.0
        if largest == "biases" and name.endswith("q_proj.bias"):
            tensor[-1] = 2.0
    save_file(weights, file, {"format": "pt"})
    scores = magnitude_scores(Checkpoint.open(folder), Selection(method="magnitude"))
    found = scores["hidden"] if largest == "norms" else scores["heads"][0]
    expected = 3 if largest == "norms" else len(found) - 1
    assert (found > found.min()).nonzero().flatten().tolist() == [expected]


def test_the_papers_score_is_the_root_of_summed_squares_of_mean_absolute_values() -> None:
    # Sequence first: two tokens of two samples; sample 0 = (1, -3), sample 1 = (2, 2).
    activations_SBC = torch.tensor([[[1.0], [2.0]], [[-3.0], [2.0]]])
    score = aggregate_batch(batch_sums(aggregate_sequence(activations_SBC, "mean")), "l2")
    assert score.item() == pytest.approx(math.sqrt(2.0**2 + 2.0**2))


def _oracle(scores: Tensor, how: Aggregation) -> Tensor:
    if how == "mean":
        return scores.abs().mean(0)
    if how == "l2":
        return scores.square().sum(0).sqrt()
    return (scores - scores.mean(0)).square().mean(0)


@pytest.mark.parametrize(("sequence", "batch"), list(itertools.product(HOW, HOW)))
def test_any_split_into_batches_and_ranks_gives_the_score_of_the_whole(
    sequence: Aggregation, batch: Aggregation
) -> None:
    activations_SBC = torch.randn(7, 12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    whole = _oracle(torch.stack([_oracle(activations_SBC[:, b], sequence) for b in range(12)]), batch)
    for cuts in ((12,), (1,) * 12, (3, 4, 5)):
        ranks = [
            batch_sums(aggregate_sequence(part, sequence)) for part in torch.split(activations_SBC, list(cuts), dim=1)
        ]
        merged = torch.stack(ranks).sum(0)
        assert merged.shape == (4, 5), "what is kept does not grow with the data"
        torch.testing.assert_close(aggregate_batch(merged, batch), whole, rtol=1e-12, atol=1e-14)


def test_bf16_activations_are_aggregated_in_fp32() -> None:
    activations = torch.full((4096, 1, 1), 1.0, dtype=torch.bfloat16)
    assert aggregate_sequence(activations, "l2").item() == 64.0
    assert aggregate_sequence(activations, "mean").dtype == torch.float32


def test_variance_survives_a_large_mean() -> None:
    scores = torch.tensor([[1e4 - 0.5], [1e4 + 0.5]], dtype=torch.float64)
    assert aggregate_batch(batch_sums(scores), "var").item() == pytest.approx(0.25, rel=1e-6)


def test_a_heads_score_is_the_length_of_its_channels_scores() -> None:
    channel_scores_LC = torch.tensor([[3.0, 4.0, 0.0, 2.0], [1.0, 0.0, 5.0, 12.0]])
    assert head_scores(channel_scores_LC, 2).tolist() == [[5.0, 2.0], [1.0, 13.0]]


def test_block_influence_by_hand() -> None:
    # Token 1 is turned by 90 degrees (cosine 0), token 2 stretched (1), token 3 reversed (-1).
    before = torch.tensor([[[1.0, 0.0]], [[2.0, 2.0]], [[1.0, 0.0]]])
    after = torch.tensor([[[0.0, 5.0]], [[3.0, 3.0]], [[-4.0, 0.0]]])
    sums = block_influence_sums(before.double(), after.double())
    assert sums.tolist() == pytest.approx([0.0, 3.0])
    assert block_influence(sums[None]).item() == pytest.approx(1.0)


def test_block_influence_is_additive_over_batches_and_zero_for_a_layer_that_does_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    before, delta = torch.randn(2, 9, 4, 16, generator=generator, dtype=torch.float64)
    after = before + 0.2 * delta
    parts = sum(block_influence_sums(before[:, b : b + 2], after[:, b : b + 2]) for b in (0, 2))
    assert isinstance(parts, Tensor)
    cosines = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    torch.testing.assert_close(block_influence(parts[None])[0], 1.0 - cosines.mean(), rtol=1e-12, atol=0)
    unchanged = block_influence(block_influence_sums(before, 3.0 * before)[None])
    assert abs(unchanged.item()) < 1e-14
