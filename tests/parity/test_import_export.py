"""Megatron computes the logits of transformers in every layout, and exports the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from nemo_minitron.schema.execution import Parallel
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import logits_of
from tests.support.tiny_models import FAMILY_CASES, load_transformers, tiny_model_dir

LAYOUTS = {
    "tp1": Parallel(),
    "tp2": Parallel(tp=2),
    "pp2": Parallel(pp=2),
    "tp4": Parallel(tp=4),
    "tp2 dp2": Parallel(tp=2, dp=2, sequence_parallel=True),
    "pp2 dp2": Parallel(pp=2, dp=2),
}
ODD_VOCAB = "a vocabulary that tp does not divide"
CASES = [*FAMILY_CASES, ODD_VOCAB]
TOKENS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {case: tiny_model_dir(folder, case) for case in FAMILY_CASES}
    return {**found, ODD_VOCAB: tiny_model_dir(folder / "odd", "llama_gqa_tied", vocab_size=401)}


SLOW = {"pp2 dp2"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS]
)
def megatron(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[NDArray, Path]]:
    """Return case -> (logits, folder to which the model was saved again), in one layout."""
    outs = {case: tmp_path_factory.mktemp("out") for case in CASES}
    parallel = LAYOUTS[request.param]
    ranks = run_ranks(parallel.world_size, logits_of, [(models[case], outs[case]) for case in CASES], parallel, TOKENS)
    last = next(values for values in reversed(ranks) if values[0] is not None)
    return {case: (logits, outs[case]) for case, logits in zip(CASES, last, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(
    case: str, models: dict[str, Path], megatron: dict[str, tuple[NDArray, Path]]
) -> None:
    with torch.no_grad():
        expected = load_transformers(models[case])(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected).max() > 1.0, "the model must say something"
    assert np.abs(megatron[case][0] - expected).max() <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_the_round_trip_is_bit_identical(
    case: str, models: dict[str, Path], megatron: dict[str, tuple[NDArray, Path]]
) -> None:
    before = load_file(models[case] / "model.safetensors")
    after = load_file(megatron[case][1] / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
