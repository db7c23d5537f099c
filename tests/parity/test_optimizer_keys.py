"""The optimizer's keys of a recipe reach Adam: the weights are those of torch's AdamW with these keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training.checkpoint import Checkpoints, TrainingProgress
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.train.params import TrainStage
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

PARAMS = TrainStage(
    kind="train",
    num_steps=4,
    global_batch_size=2,
    seq_len_tokens=32,
    lr=2e-3,
    lr_schedule="constant",
    precision="fp32",
    valid_num_tokens=64,
    adam_beta1=0.8,
    adam_beta2=0.7,
    adam_eps=1e-3,
    weight_decay=0.3,
    clip_grad=0.05,
)
OTHERS = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_eps": 3e-4, "weight_decay": 0.1, "clip_grad": 0.02, "lr": 1e-3}
LAYOUTS = {"plain optimizer": Parallel(), "distributed optimizer": Parallel(distributed_optimizer=True)}
Steps = list[tuple[TrainStage, list[Tensor]]]
"""The keys and the gradients of each step."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a model with biases and its data."""
    root = tmp_path_factory.mktemp("keys")
    return {"model": tiny_model_dir(root, "qwen2"), "data": tiny_data_dir(root / "data"), "work": root}


def _weights(job: training.Job) -> list[Tensor]:
    return [weight.detach().clone() for weight in job.trainable.model.parameters()]


def _train(job: training.Job, params: TrainStage, steps: range) -> Steps:
    """Train, and return the gradients of each step before they are clipped."""
    found = []
    for step in steps:
        training.forward_backward(job, step)
        found.append((params, [weight.main_grad.clone() for weight in job.trainable.model.parameters()]))
        training.update(job.trainable)
    return found


def _with(key: str, value: float, steps: Steps) -> Steps:
    return [(params.model_copy(update={key: value}), gradients) for params, gradients in steps]


def _by_torch(before: list[Tensor], steps: Steps) -> list[Tensor]:
    """Return the weights that torch's AdamW makes of these; those with one dimension do not decay."""
    weights = [nn.Parameter(weight.clone()) for weight in before]
    decayed, others = ([weight for weight in weights if (weight.dim() > 1) == decays] for decays in (True, False))
    adam = torch.optim.AdamW([{"params": decayed}, {"params": others}])
    for params, gradients in steps:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        nn.utils.clip_grad_norm_(weights, params.clip_grad)
        for group, decay in zip(adam.param_groups, (params.weight_decay, 0.0), strict=True):
            betas = (params.adam_beta1, params.adam_beta2)
            group.update(lr=params.lr, betas=betas, eps=params.adam_eps, weight_decay=decay)
        adam.step()
    return [weight.detach() for weight in weights]


def _distance(some: list[Tensor], others: list[Tensor]) -> float:
    return float(torch.stack([(one - other).abs().max() for one, other in zip(some, others, strict=True)]).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adam_has_the_keys_of_the_recipe_also_after_a_resume_with_others(
    layout: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with open_session(LAYOUTS[layout], device="cpu", threads=1) as session:

        def resumed(params: TrainStage) -> tuple[training.Job, Checkpoints]:
            job = distill.prepare_training(params, folders["model"], folders["data"], folders["work"], session)
            kept = Checkpoints(tmp_path / "checkpoints", session, keep=1, in_background=False)
            kept.resume(job.trainable)
            return job, kept

        job, kept = resumed(PARAMS)
        before = _weights(job)
        steps = _train(job, PARAMS, range(2))
        half_way = _weights(job)
        kept.save(job.trainable, TrainingProgress(2))
        changed = PARAMS.model_copy(update=OTHERS)
        job, _ = resumed(changed)
        assert _distance(_weights(job), half_way) == 0.0
        steps += _train(job, changed, range(2, 4))
        found = _weights(job)

    assert _distance(half_way, _by_torch(before, steps[:2])) < 1e-6
    assert _distance(found, _by_torch(before, steps)) < 1e-6
    for key, value in OTHERS.items():
        with_other = _by_torch(before, _with(key, value, steps[:2]))
        assert _distance(half_way, with_other) > 1e-5, f"{key} must matter for this to mean anything"
        with_old = _by_torch(before, [*steps[:2], *_with(key, getattr(PARAMS, key), steps[2:])])
        assert _distance(found, with_old) > 1e-5, f"{key} must matter for this to mean anything"
