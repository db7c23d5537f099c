"""Our five preference losses and NeMo-Aligner's own: the same values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from tests.support.aligner import quiet
from tests.support.preference_losses import LOSSES, Pairs, answer_log_probs

CASES: dict[str, dict[str, Any]] = {
    f"{kind} {'averaged' if average else 'summed'}": {
        "kind": kind,
        "beta": 0.3,
        "reward_scale": 1.7,
        "average": average,
    }
    for kind in LOSSES
    for average in (False, True)
}
PAIRS, TOKENS = 6, 11


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Log-probabilities of every token [2 * pairs, tokens], the chosen answers first; labels -100 do not count."""
    generator = torch.Generator().manual_seed(0)

    def log_probs() -> torch.Tensor:
        return -torch.rand(2 * PAIRS, TOKENS, generator=generator) * 2

    labels = torch.randint(0, 50, (2 * PAIRS, TOKENS), generator=generator)
    labels[:, :3] = -100
    labels[::2, -4:] = -100
    rewards = torch.rand(2 * PAIRS, generator=generator) * 4
    return {"policy": log_probs(), "reference": log_probs(), "labels": labels, "rewards": rewards}


@pytest.fixture(scope="module")
def theirs(inputs: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    work = tmp_path_factory.mktemp("losses")
    save_file(inputs, work / "inputs.safetensors")
    task = {"inputs": str(work / "inputs.safetensors"), "cases": CASES, "out": str(work / "out.safetensors")}
    run_task("preference_losses", task, work / "work", work / "log.txt", *quiet())
    return load_file(work / "out.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_same(
    name: str, inputs: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> None:
    case = CASES[name]
    policy = inputs["policy"].clone().requires_grad_()
    chosen, rejected = answer_log_probs(policy, inputs["labels"], average=case["average"]).chunk(2)
    reference = answer_log_probs(inputs["reference"], inputs["labels"], average=case["average"]).chunk(2)
    pairs = Pairs(chosen, rejected, *reference, *inputs["rewards"].chunk(2))
    loss = LOSSES[case["kind"]](pairs, case["beta"], case["reward_scale"]).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach().reshape(1), theirs[f"{name}.loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.grad, theirs[f"{name}.grad"], rtol=1e-4, atol=1e-6)
