"""Metrics of aligned models, as pure functions of numbers and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

NUM_BOOTSTRAPS, SEED = 1000, 0


def preference_metrics(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float | None]:
    """Return how often the chosen answer has the higher value, and the mean margin in nats, with standard errors.

    Standard errors are over the pairs, and None for a single pair.

    Args:
        chosen, rejected: implicit rewards log pi / pi_ref, or log-probabilities, of at least one pair. Equal values
            count as half.
    """
    margin = np.asarray(chosen) - np.asarray(rejected)
    ahead = (margin > 0) + 0.5 * (margin == 0)
    return {
        "pairs": len(margin),
        "accuracy": float(ahead.mean()),
        "accuracy_se": _standard_error(ahead),
        "margin_nats": float(margin.mean()),
        "margin_nats_se": _standard_error(margin),
    }


def answer_loss(log_probs: Sequence[float], sizes: Sequence[int]) -> dict[str, float | None]:
    """Return the loss per token of some answers, with its standard error over the answers (None for a single one).

    Args:
        log_probs: log-probability of each answer, summed over its tokens.
        sizes: tokens of each answer.
    """
    found, tokens = np.asarray(log_probs), np.asarray(sizes)
    loss = -float(found.sum() / tokens.sum())
    # The error of a ratio of two sums over the same answers, to first order.
    error = _standard_error(-found - loss * tokens)
    return {"loss_nats_per_token": loss, "loss_se": None if error is None else error / float(tokens.mean())}


def _standard_error(values: NDArray[Any]) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def rank_correlation(levels: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return Spearman's rank correlation of lengths with requested levels; standard error by bootstrap over prompts.

    Args:
        levels, lengths: requested level and length of each answer, [prompts][levels].
    """
    x, y = np.asarray(levels, dtype=float), np.asarray(lengths, dtype=float)
    generator = np.random.default_rng(SEED)
    draws = [generator.integers(0, len(x), len(x)) for _ in range(NUM_BOOTSTRAPS)]
    spread = [_spearman(x[rows].ravel(), y[rows].ravel()) for rows in draws]
    return {"prompts": len(x), "rank_correlation": _spearman(x.ravel(), y.ravel()), "se": float(np.std(spread))}


def _spearman(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Return Spearman's rank correlation, or 0 if one side is constant."""
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(stats.spearmanr(x, y).statistic)
