"""Keys that nothing would read, or that a layout cannot serve, are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nemo_minitron.schema.losses import LogitsLoss
from nemo_minitron.schema.training_rules import learning_rate_problems
from nemo_minitron.stages.train.params import TrainStage
from tests.conftest import TOY, Cli

KEYS = {"kind": "train", "num_steps": 10, "global_batch_size": 1, "seq_len_tokens": 8, "lr": 1e-3}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "forward_kl", "jsd_beta": 0.2}, "jsd_beta goes with kind jsd"),
        ({"kind": "reverse_kl", "of": "logits"}, "of goes with kind mse or cosine"),
    ],
)
def test_a_key_of_another_loss_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LogitsLoss.model_validate(keys)


def test_the_decay_of_another_schedule_is_refused() -> None:
    params = TrainStage.model_validate({**KEYS, "wsd_decay_steps": 5})
    (problem,) = learning_rate_problems("stages.train", params, 10, "num_steps")
    assert "wsd_decay_steps = 5: read by lr_schedule = wsd only" in problem


@pytest.mark.parametrize(
    ("keys", "is_refused"),
    [
        ({}, True),
        ({"lr_schedule": "linear", "min_lr": 1e-4}, True),
        ({"lr_schedule": "wsd", "wsd_decay_steps": 1}, True),
        ({"lr_schedule": "constant"}, False),
        ({"min_lr": 1e-3}, False),
    ],
)
def test_a_learning_rate_that_no_step_uses_is_refused(keys: dict[str, object], is_refused: bool) -> None:
    params = TrainStage.model_validate({**KEYS, **keys})
    assert [line for line in learning_rate_problems("stages.train", params, 2, "num_steps") if "lr = " in line] == []
    found = list(learning_rate_problems("stages.train", params, 1, "num_steps"))
    assert any("stages.train.lr = 0.001: never used" in line for line in found) == is_refused


def test_sequence_parallelism_must_divide_held_out_sequences(minitron: Cli) -> None:
    options = ("execution.parallel.tp=2", "execution.parallel.sequence_parallel=true")
    code, output = minitron("check", TOY, *options, "stages.evaluate_teacher.seq_len_tokens=127")
    assert code == 2
    assert "stages.evaluate_teacher.seq_len_tokens = 127: sequence_parallel needs a multiple of tp = 2" in output
    assert minitron("check", TOY, *options)[0] == 0
