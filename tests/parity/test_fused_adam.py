"""Torch's fused Adam: the same training as with the plain one, and resumes to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training import optim
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.train.params import TrainStage
from tests.support.megatron_ranks import rows_until
from tests.support.tiny_distill import distill_folders

PARAMS = TrainStage(
    kind="train",
    num_steps=6,
    global_batch_size=2,
    seq_len_tokens=32,
    lr=2e-3,
    precision="fp32",
    valid_num_tokens=64,
    save_interval_steps=3,
)
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return distill_folders(tmp_path_factory.mktemp("fused"))


def _rows(folders: Folders, work: Path, session: Any, last_step: int) -> list[dict[str, float]]:
    work.mkdir(exist_ok=True)
    job = distill.prepare_training(PARAMS, folders["teacher"], folders["data"], work, session)
    rows = rows_until(job, work, last_step)
    for group in job.trainable.optimizer.param_groups:
        assert bool(group.get("fused")) == optim.can_be_fused(group["params"])
    # A training that stops early has one more validation.
    return [row for row in rows if "train_loss" in row]


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
def test_the_fused_adam_trains_the_same_and_resumes_to_the_same_bits(
    distributed: bool, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Parallel(distributed_optimizer=distributed)
    with open_session(layout, device="cpu", threads=1) as session:
        with monkeypatch.context() as without:
            without.setattr(optim, "can_be_fused", lambda _: False)
            plain = _rows(folders, tmp_path / "plain", session, 6)
            _rows(folders, tmp_path / "changed", session, 3)
        whole = _rows(folders, tmp_path / "whole", session, 6)
        _rows(folders, tmp_path / "resumed", session, 3)
        assert _rows(folders, tmp_path / "resumed", session, 6) == whole
        changed = _rows(folders, tmp_path / "changed", session, 6)
        monkeypatch.setattr(optim, "can_be_fused", lambda _: False)
        back = _rows(folders, tmp_path / "whole", session, 6)
    assert back == whole, "a finished training of the fused Adam is read without it"
    for found in (whole, changed):
        for row, expected in zip(found, plain, strict=True):
            assert row == pytest.approx(expected, rel=1e-5)


def test_the_gradient_norm_is_known_without_clipping(folders: Folders, tmp_path: Path) -> None:
    """A NaN gradient shows in it before the weights reach a checkpoint."""
    params, norms, weights = PARAMS.model_copy(update={"clip_grad": 0.0}), [], []
    with open_session(Parallel(), device="cpu", threads=1) as session:
        for number in range(2):
            (work := tmp_path / f"{number}").mkdir()
            job = distill.prepare_training(params, folders["teacher"], folders["data"], work, session)
            training.forward_backward(job, 0)
            optimizer = job.trainable.optimizer
            # Alone as in Megatron-Core 0.10, or through the chain around it.
            single = getattr(optimizer, "chained_optimizers", [optimizer])[0] if number else optimizer
            norms.append(single.step()[1])
            weights.append([weight.detach().clone() for weight in job.trainable.model.parameters()])
    assert norms[0] == norms[1] > 1.0
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_only_parameters_of_a_cpu_or_gpu_are_fused() -> None:
    assert optim.can_be_fused([torch.zeros(2)])
    assert not optim.can_be_fused([torch.zeros(2), torch.zeros(2, device="meta")])
    assert not optim.can_be_fused([])
