"""Learning rates of every schedule, by formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from nemo_minitron.backends.megatron.training.optim import _schedule
from nemo_minitron.stages.train.params import TrainStage

STEPS, WARMUP, LR, MIN_LR = 50, 10, 1.0, 0.1


def _after_warmup(step: int) -> float:
    return (step - WARMUP) / (STEPS - WARMUP)


EXPECTED: dict[str, Callable[[int], float]] = {
    "cosine": lambda step: MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * _after_warmup(step))) / 2,
    "linear": lambda step: MIN_LR + (LR - MIN_LR) * (1 - _after_warmup(step)),
    "constant": lambda step: LR,
    "wsd": lambda step: (
        LR if step <= STEPS - 8 else MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (step - STEPS + 8) / 8)) / 2
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rates_follow_the_formula(name: str) -> None:
    keys = {"kind": "train", "num_steps": STEPS, "global_batch_size": 1, "seq_len_tokens": 8, "lr": LR}
    more = {
        "min_lr": MIN_LR,
        "warmup_steps": WARMUP,
        "lr_schedule": name,
        "wsd_decay_steps": 8 if name == "wsd" else None,
    }
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = _schedule(optimizer, TrainStage.model_validate({**keys, **more}), STEPS)
    for step in range(1, STEPS + 1):
        schedule.step(1)
        expected = LR * step / WARMUP if step <= WARMUP else EXPECTED[name](step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), step
