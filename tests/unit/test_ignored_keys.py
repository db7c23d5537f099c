"""Keys that nothing would read, or that a layout cannot serve, are refused."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from nemo_minitron.pruning.importance import METHODS
from nemo_minitron.schema.base import WidthMethod
from nemo_minitron.schema.losses import LogitsLoss
from nemo_minitron.schema.training_rules import learning_rate_problems
from nemo_minitron.stages.score.kind import _unread
from nemo_minitron.stages.score.params import ScoreStage
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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("method: wanda, neuron_score: before_activation", "neuron_score = before_activation: read by method = activ"),
        ("method: wanda, convention: paper", "convention = paper: read by method = activation and taylor"),
        ("method: wanda, batch_aggregation: var", "batch_aggregation = var: read by method = activation and taylor"),
        (
            "method: wanda, sequence_aggregation: l2",
            "sequence_aggregation = l2: read by method = activation and taylor",
        ),
        ("width_axes: [hidden], convention: paper", "convention = paper: read by method = activation and taylor, for"),
        ("width_axes: [heads], neuron_score: after_activation", "neuron_score = after_activation: read by method"),
        ("layer_metrics: [], block_lengths: [2]", "block_lengths = [2]: read by layer_metrics only"),
        ("layer_metrics: [], iterative_drops: 1", "iterative_drops = 1: read by layer_metrics only"),
        ("depth_task: {name: winogrande}", "'limit': 100}: read by layer_metrics with task only"),
    ],
)
def test_keys_of_scores_that_nothing_reads_are_refused(keys: str, message: str, minitron: Cli) -> None:
    code, output = minitron("check", TOY, f"stages.score={{num_samples: 4, {keys}}}")
    assert code == 2
    assert message in " ".join(output.split())


def test_the_scores_of_a_method_without_aggregation_have_no_rules_for_it(minitron: Cli) -> None:
    options = (
        "execution.parallel.micro_batch_size=1",
        "stages.score.num_samples=1",
        "stages.score.batch_aggregation=var",
    )
    assert "one value has no variance" in minitron("check", TOY, *options)[1]
    assert "one value has no variance" not in minitron("check", TOY, *options, "stages.score.method=wanda")[1]


def test_every_method_that_weighs_columns_is_known_to_the_rules() -> None:
    for method in get_args(WidthMethod):
        unread = dict(_unread(ScoreStage(kind="score", method=method)))
        assert METHODS[method].weighs_columns == ("batch_aggregation" in unread) == ("convention" in unread)


def test_a_layout_of_a_stage_that_has_none_is_refused(minitron: Cli) -> None:
    code, output = minitron("check", TOY, "execution.parallel_by_stage={prune: {dp: 2}}")
    assert code == 2
    words = " ".join(output.split())
    assert (
        "parallel_by_stage.prune: a stage of kind prune has no parallel layout. Allowed: check_teacher, score" in words
    )


def test_kernels_for_gpus_are_refused_on_cpus_if_a_training_would_use_them(
    minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = ("execution.device=cpu", "execution.kernels.fused_kl=triton")
    code, output = minitron("check", TOY, *options)
    assert code == 2
    words = " ".join(output.split())
    assert "execution.kernels.fused_kl = triton: needs a GPU, and execution.device = cpu (stages: distill)" in words
    assert "Allowed: auto, torch, off." in words
    assert minitron("check", TOY, *options, "+stages.distill.loss.logits.kind=reverse_kl")[0] == 0


def test_sequence_parallelism_must_divide_held_out_sequences(minitron: Cli) -> None:
    options = ("execution.parallel.tp=2", "execution.parallel.sequence_parallel=true")
    code, output = minitron("check", TOY, *options, "stages.evaluate_teacher.seq_len_tokens=127")
    assert code == 2
    assert "stages.evaluate_teacher.seq_len_tokens = 127: sequence_parallel needs a multiple of tp = 2" in output
    assert minitron("check", TOY, *options)[0] == 0
