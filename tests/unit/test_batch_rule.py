"""The batch size that the planner proposes for a number of training tokens."""

from __future__ import annotations

import json
from math import log
from pathlib import Path

import pytest

from nemo_minitron.schema.training import TextTraining
from nemo_minitron.workload.batch import batch_proposal, best_batch_tokens
from tests.conftest import TOY, Cli


@pytest.mark.parametrize(("num_tokens", "batch"), [(1e9, 0.18e6), (2.5e9, 0.25e6), (10e9, 0.42e6), (94e9, 1.0e6)])
def test_the_rule_is_that_of_the_paper(num_tokens: float, batch: float) -> None:
    assert best_batch_tokens(num_tokens) == pytest.approx(batch, rel=0.03)


def _training(**keys: object) -> TextTraining:
    return TextTraining(**{"lr": 1e-4, "num_steps": 400, "global_batch_size": 768, "seq_len_tokens": 8192, **keys})


def test_the_keys_keep_tokens_half_life_and_timescale() -> None:
    keys = _training(warmup_steps=40)
    found = batch_proposal(keys, keys.num_steps)
    assert (found.num_tokens, found.batch_tokens) == (400 * 768 * 8192, 768 * 8192)
    batch = found.global_batch_size * 8192
    assert batch == pytest.approx(found.best_batch_tokens, rel=0.05)
    assert found.num_steps * batch == pytest.approx(found.num_tokens, rel=0.001)
    assert found.warmup_steps * batch == pytest.approx(40 * 768 * 8192, rel=0.02)
    half_lives = [size / -log(beta) for size, beta in ((found.batch_tokens, 0.95), (batch, found.adam_beta2))]
    assert half_lives[1] == pytest.approx(half_lives[0])
    timescales = [
        size / (1e-4 * decay * found.num_tokens)
        for size, decay in ((found.batch_tokens, 0.1), (batch, found.weight_decay))
    ]
    assert timescales[1] == pytest.approx(timescales[0])


def test_the_batch_fits_the_layout() -> None:
    found = batch_proposal(_training(), 400, sequences_at_once=16)
    assert found.global_batch_size % 16 == 0
    assert batch_proposal(_training(), 400, sequences_at_once=512).global_batch_size == 512


@pytest.mark.parametrize(
    ("keys", "too_large"),
    [
        ({}, True),
        ({"global_batch_size": 32, "num_steps": 9600}, False),
        ({"global_batch_size": 4, "num_steps": 76800}, False),
        ({"num_steps": 15000}, False),
    ],
    ids=["published batch", "rule", "smaller", "94B tokens"],
)
def test_a_smaller_batch_is_proposed_for_few_tokens_only(keys: dict[str, int], too_large: bool) -> None:
    training = _training(**keys)
    assert batch_proposal(training, training.num_steps).is_too_large == too_large


def test_the_plan_names_batch_and_keys(tmp_path: Path, minitron: Cli) -> None:
    large = ["stages.distill.global_batch_size=512", "stages.distill.num_steps=20", f"execution.run_root={tmp_path}"]
    facts = json.loads(minitron("plan", TOY, *large, "--json")[1])["resources"]["batches"]["distill"]
    assert facts["is_too_large"]
    text = " ".join(minitron("plan", TOY, *large)[1].split())
    assert "batch of distill" in text
    assert f"global_batch_size: {facts['global_batch_size']}, num_steps: {facts['num_steps']}" in text
    assert "batch of distill" not in minitron("plan", TOY, f"execution.run_root={tmp_path}")[1]
