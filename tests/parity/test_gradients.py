"""Gradients of every loss, in every layout, against plain formulas in one process."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.losses import HiddenLoss, LogitsLoss, Loss, Sampled, TopK
from tests.support.distributed import run_ranks
from tests.support.gradients import (
    Found,
    boundary_gradients,
    package_gradients,
    plain_boundary_gradients,
    plain_gradients,
)
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

KL = LogitsLoss()
LOSSES = {
    "forward_kl": Loss(),
    "forward_kl, T 2, times T^2": Loss(logits=LogitsLoss(temperature=2.0, times_temperature_squared=True)),
    "reverse_kl": Loss(logits=LogitsLoss(kind="reverse_kl", temperature=0.7)),
    "jsd": Loss(logits=LogitsLoss(kind="jsd", jsd_beta=0.3)),
    "mse of logits": Loss(logits=LogitsLoss(kind="mse", of="logits")),
    "mse of probabilities": Loss(logits=LogitsLoss(kind="mse")),
    "cosine of logits": Loss(logits=LogitsLoss(kind="cosine", of="logits")),
    "cosine of probabilities": Loss(logits=LogitsLoss(kind="cosine", temperature=2.0)),
    "top-k with a ghost": Loss(logits=LogitsLoss(sparse=TopK(kind="top_k", k=7))),
    "top-k without tail": Loss(logits=LogitsLoss(sparse=TopK(kind="top_k", k=7, tail="drop"), temperature=1.5)),
    "draws": Loss(logits=LogitsLoss(sparse=Sampled(kind="sampled", rounds=20))),
    "next token": Loss(logits=None, next_token=1.0),
    "KL and next token": Loss(next_token=0.3),
    "KL and next token, balanced": Loss(next_token="balanced"),
    "hidden, dynamic": Loss(hidden=HiddenLoss()),
    "hidden, many": Loss(
        logits=KL,
        next_token=0.1,
        hidden=HiddenLoss(
            kind="mse", weight=0.5, states=("mlp_input", "block_output"), pairs=((0, 0), (4, 1), (-1, -1), (0, 3))
        ),
    ),
}
LAYOUTS = {
    "one process": Parallel(),
    "tp2": Parallel(tp=2),
    "tp4": Parallel(tp=4),
    "tp2 with sequence parallel": Parallel(tp=2, sequence_parallel=True),
    "pp2": Parallel(pp=2),
    "tp2 pp2 with sequence parallel": Parallel(tp=2, pp=2, sequence_parallel=True),
    "dp2": Parallel(dp=2),
    "cp2 pp2": Parallel(cp=2, pp=2),
}
FAST = {"whole": ("one process", "tp2", "dp2"), "chunked": tuple(name for name in LAYOUTS if name != "tp4")}
"""Layouts in `make test`, for the whole logits at once and in chunks. `make test-all` has all of them."""
BOUND_FP64, BOUND_FP32 = 1e-12, 1e-6
"""The gradients of a whole model in fp32 differ by more than this between layouts whatever the loss is (about 2e-6):
the order of sums in its layers differs. In fp32 the loss is tested where it meets the model.
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher with other depth, width and vocabulary than the student; no vocabulary divides by 2 or 4."""
    root = tmp_path_factory.mktemp("gradients")
    student = {"vocab_size": 507, "hidden_size": 48, "head_dim": 8, "intermediate_size": 64, "seed": 1}
    return {
        "student": tiny_model_dir(root / "student", "llama_gqa_tied", **student),
        "teacher": tiny_model_dir(root / "teacher", "llama_mha", vocab_size=515, num_hidden_layers=6),
        "data": tiny_data_dir(root / "data", vocab_size=507),
        "work": root / "work",
    }


@cache
def _expected(folders: tuple[tuple[str, Path], ...]) -> dict[str, Found]:
    return plain_gradients(LOSSES, "fp64", dict(folders))


def _worst(found: dict[str, NDArray], expected: dict[str, NDArray]) -> tuple[float, str]:
    """Largest error of a gradient, relative to the gradient (Euclidean norms). NaN counts as infinite."""
    assert found.keys() == expected.keys()
    errors = {
        name: float(np.linalg.norm(found[name].astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))
        for name, want in expected.items()
    }
    return max((math.inf if math.isnan(error) else error, name) for name, error in errors.items())


@pytest.mark.parametrize("place", range(3))
def test_a_gradient_that_is_nan_is_the_worst_one(place: int) -> None:
    expected = {name: np.ones(2) for name in "abc"}
    found = {**expected, "abc"[place]: np.array([1.0, np.nan])}
    assert _worst(found, expected) == (math.inf, "abc"[place])


@pytest.mark.parametrize(
    ("chunk_tokens", "layout"),
    [
        pytest.param(size, name, id=f"{kind}-{name}", marks=[pytest.mark.slow] * (name not in FAST[kind]))
        for kind, size in {"whole": None, "chunked": 5}.items()
        for name in LAYOUTS
    ],
)
def test_every_loss_has_the_gradients_of_the_plain_formula(
    layout: str, chunk_tokens: int | None, folders: dict[str, Path]
) -> None:
    parallel = LAYOUTS[layout]
    expected = _expected(tuple(folders.items()))
    ranks = run_ranks(parallel.world_size, package_gradients, LOSSES, "fp64", parallel, folders, chunk_tokens)
    worst = {name: _worst(ranks[0][name][0], expected[name][0]) for name in LOSSES}
    for name, (error, where) in worst.items():
        print(f"{layout}, {name}: {error:.1e} in {where}")
    assert max(worst.values())[0] <= BOUND_FP64


@pytest.mark.parametrize("chunk_tokens", [None, 5], ids=["whole", "chunked"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_in_fp32_the_loss_has_the_gradients_of_the_plain_formula(tp: int, chunk_tokens: int | None) -> None:
    """Check the gradients of the head's input and weight, with a vocabulary that 2 and 4 do not divide."""
    losses = {name: loss for name, loss in LOSSES.items() if loss.hidden is None and name != "draws"}
    expected = plain_boundary_gradients(losses)
    found = run_ranks(tp, boundary_gradients, losses, tp, chunk_tokens)[0]
    worst = {name: _worst(found[name], expected[name]) for name in losses}
    for name, (error, where) in worst.items():
        print(f"tp{tp}, fp32, {name}: {error:.1e} in {where}")
    assert max(worst.values())[0] <= BOUND_FP32
