"""How well an attribute model agrees with the ratings of people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.chat.render import MISSING
from nemo_minitron.data.chat.rows import ATTRIBUTES


def agreement(
    labels: Sequence[Sequence[float]], found: Sequence[Sequence[float]], train: Iterable[Sequence[float]]
) -> dict[str, Any]:
    """Compare the model with a constant, the mean of the training labels, for each attribute that people rated.

    Args:
        labels, found: ratings of people, and the model's, of the held-out texts: [texts][attributes].
        train: ratings of people of the training texts.

    Returns:
        {attribute: {rows, mse, mse_of_mean, r2_over_mean, pearson}}, and the same for `all` together.
    """
    truth, predicted, before = (np.asarray(list(part), dtype=float) for part in (labels, found, train))
    out: dict[str, Any] = {}
    errors, constants = [], []
    for index, name in enumerate(ATTRIBUTES):
        rated, seen = truth[:, index] != MISSING, before[:, index] != MISSING
        if rated.sum() < 2 or not seen.any():
            continue
        wanted, given = truth[rated, index], predicted[rated, index]
        error, constant = (wanted - given) ** 2, (wanted - before[seen, index].mean()) ** 2
        errors.append(error)
        constants.append(constant)
        out[name] = _measures(error, constant) | {"pearson": _pearson(wanted, given)}
    if errors:
        out["all"] = _measures(np.concatenate(errors), np.concatenate(constants))
    return out


def _measures(error: NDArray[Any], constant: NDArray[Any]) -> dict[str, float]:
    mse, mse_of_mean = float(error.mean()), float(constant.mean())
    ratio = 1.0 - mse / mse_of_mean if mse_of_mean else 0.0
    return {"rows": len(error), "mse": mse, "mse_of_mean": mse_of_mean, "r2_over_mean": ratio}


def _pearson(wanted: NDArray[Any], given: NDArray[Any]) -> float | None:
    if wanted.std() == 0 or given.std() == 0:
        return None
    return float(np.corrcoef(wanted, given)[0, 1])
