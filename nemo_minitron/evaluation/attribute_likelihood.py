"""Probabilities of ratings under an attribute model, and the weights of SteerLM 2.0 (2406.08673, section 4.5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincc, logsumexp

from nemo_minitron.data.chat.rows import ATTRIBUTES, MAX_RATING

CONCENTRATION = 24.0
"""alpha + beta of the Beta distribution around a prediction (2406.08673, section 4.5)."""
MARGIN = 0.01
"""Smallest distance of the distribution's mean from 0 and from 1, where the Beta distribution is not defined."""


def attributes_log_prob(predictions: Sequence[float], requested: Mapping[str, int]) -> float:
    """Return log P(a|x,y) in nats for predictions in the order of ATTRIBUTES, summed over the requested attributes."""
    found = dict(zip(ATTRIBUTES, predictions, strict=True))
    return math.fsum(rating_log_prob(found[name], rating) for name, rating in requested.items())


def rating_log_prob(prediction: float, rating: int) -> float:
    """Return the log-probability in nats of one integer rating from 0 to 4.

    The prediction r of the attribute model, divided by 4, is the mean of a Beta distribution with alpha = 24 r / 4 and
    beta = 24 - alpha. P(a = n) is its mass where 4 times the value rounds to n.
    """
    mean = min(max(prediction / MAX_RATING, MARGIN), 1.0 - MARGIN)
    alpha = CONCENTRATION * mean
    beta = CONCENTRATION - alpha
    low, high = (min(max((rating + side) / MAX_RATING, 0.0), 1.0) for side in (-0.5, 0.5))
    # The difference of two numbers close to 1 would be inaccurate, so the tail on the far side of the mean is used.
    if low > mean:
        mass = betaincc(alpha, beta, low) - betaincc(alpha, beta, high)
    else:
        mass = betainc(alpha, beta, high) - betainc(alpha, beta, low)
    return math.log(mass)


def answer_weights(
    log_attributes: Sequence[float], log_reference: Sequence[float], log_model: Sequence[float]
) -> NDArray[np.float64]:
    """Return the normalized weights w' of the answers to one prompt: the softmax of log P(a|x,y) + log P(y|x) - log Q.

    NeMo-Aligner's SteerLM2Dataset computes the same from the rows.
    """
    logs = np.asarray(log_attributes) + np.asarray(log_reference) - np.asarray(log_model)
    weights: NDArray[np.float64] = np.exp(logs - logsumexp(logs))
    return weights


def effective_answers(weights: NDArray[np.float64]) -> float:
    """Return 1 / sum(w'^2): how many answers with equal weights would be as informative."""
    return float(1.0 / np.square(weights).sum())


def distance_to_uniform(weights: NDArray[np.float64]) -> float:
    """Return KL(w' || uniform) in nats, which is the distance of SteerLM 2.0 before its first step."""
    present = weights[weights > 0]
    return float((present * np.log(present * len(weights))).sum())
