"""The faster paths of a training step give the loss and the gradients of the plain ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nemo_minitron.backends.megatron.model.head import head_main_grad, head_weight
from nemo_minitron.backends.megatron.model.layers import fuse_weight_gradients
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training.optim import make_trainable
from nemo_minitron.distillation.linear import MainGrad, linear_loss
from nemo_minitron.schema.execution import Kernels, Parallel
from nemo_minitron.schema.losses import LogitsLoss, Loss
from tests.support.distributed import run_ranks
from tests.support.gradients import kernel_gradients
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_distill import TWENTY_STEPS
from tests.support.tiny_models import tiny_model_dir

PLAIN = Kernels(head_gradient_in_place=False, fused_kl="off")
FAST = {
    "in place": Kernels(fused_kl="off"),
    "fused KL": PLAIN.model_copy(update={"fused_kl": "torch"}),
    "both, chunks of 7": Kernels(fused_kl="torch", chunk_tokens=7),
}
LOSSES = {
    "kl": Loss(),
    "softened": Loss(logits=LogitsLoss(temperature=2.0, times_temperature_squared=True)),
    "balanced": Loss(next_token="balanced"),
    "text": Loss(logits=None, next_token=1.0),
}
LAYOUTS = {
    "one": Parallel(),
    "tp2": Parallel(tp=2, sequence_parallel=True),
    "pp2": Parallel(pp=2),
    "cp2": Parallel(cp=2),
    "dp2": Parallel(dp=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
}


HEADS = {"llama31_rope": "lm_head.weight", "llama_gqa_tied": "model.embed_tokens.weight"}
"""Model with its own output layer, and with tied embeddings -> weight of the output layer."""


@pytest.fixture(scope="module", params=HEADS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, case = tmp_path_factory.mktemp("kernels"), request.param
    return {
        "student": tiny_model_dir(root / "student", case, intermediate_size=64, seed=1),
        "teacher": tiny_model_dir(root / "teacher", case),
        "data": tiny_data_dir(root / "data"),
        "work": root,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_fp32_loss_and_gradients_are_those_of_the_plain_path(layout: str, folders: dict[str, Path]) -> None:
    parallel = LAYOUTS[layout]
    found = run_ranks(parallel.world_size, kernel_gradients, LOSSES, "fp32", parallel, folders, {"": PLAIN, **FAST})
    # Values are on the last stage only, gradients on the first rank.
    gradients, values = found[0], found[-1]
    for name in FAST:
        for loss in LOSSES:
            (plain, _), (fast, _) = gradients[""][loss], gradients[name][loss]
            for parameter, expected in plain.items():
                distance = np.linalg.norm(fast[parameter] - expected)
                assert distance <= 1e-6 * np.linalg.norm(expected), (name, loss, parameter)
            np.testing.assert_allclose(values[name][loss][1], values[""][loss][1], rtol=1e-6)


def test_in_bf16_the_gradient_of_the_head_is_nearer_to_the_exact_one(folders: dict[str, Path]) -> None:
    head = HEADS[folders["student"].name]
    kernels = {"": PLAIN, **FAST}
    found = run_ranks(1, kernel_gradients, {"kl": Loss()}, "bf16", Parallel(), folders, kernels)[0]
    exact = run_ranks(1, kernel_gradients, {"kl": Loss()}, "fp32", Parallel(), folders, {"": PLAIN})[0][""]["kl"][0]

    def error(name: str, parameter: str) -> float:
        gradient = found[name]["kl"][0][parameter]
        return float(np.linalg.norm(gradient - exact[parameter]) / np.linalg.norm(exact[parameter]))

    for name in FAST:
        assert error(name, head) <= 1.02 * error("", head), name
        for parameter in exact:
            assert error(name, parameter) <= 1.2 * error("", parameter) + 1e-3, (name, parameter)


@pytest.mark.parametrize("case", HEADS)
def test_the_head_adds_to_the_buffer(case: str, tmp_path: Path) -> None:
    folder, is_tied = tiny_model_dir(tmp_path, case), case == "llama_gqa_tied"
    with open_session(Parallel(), device="cpu", threads=1) as session:
        model, _ = load_model(folder, session, precision="bf16", seq_len_tokens=32)
        assert head_main_grad(model) is None
        trainable = make_trainable(model, TWENTY_STEPS, 20, session.parallel, session.kernels)
        main_grad = head_main_grad(trainable.ddp)
        assert main_grad is not None
        hidden = torch.ones(3, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        weight = head_weight(trainable.ddp, 500)
        loss = linear_loss(hidden, weight, torch.ones(3), lambda s, _: (s.sum(-1), s.fill_(2.0)), main_grad=main_grad)
        assert main_grad.scale == 1 / TWENTY_STEPS.global_batch_size
        # 3 tokens, gradient 2 for each logit; padding has none.
        assert main_grad.parameter.main_grad[:500].unique().tolist() == [6 * main_grad.scale]
        assert not main_grad.parameter.main_grad[500:].any()
        (loss * main_grad.scale).backward(retain_graph=True)
        # Megatron's hook still has to add the gradient of tied embeddings.
        assert main_grad.parameter.grad_added_to_main_grad != is_tied
        assert main_grad.parameter.main_grad[:500].unique().tolist() == [6 * main_grad.scale], "the hook adds nothing"


def test_a_loss_that_is_scaled_in_another_way_is_noticed() -> None:
    weight = nn.Parameter(torch.ones(5, 4))
    weight.main_grad = torch.zeros(5, 4)  # type: ignore[attr-defined]
    hidden = torch.ones(3, 4, requires_grad=True)
    loss = linear_loss(
        hidden, weight, torch.ones(3), lambda s, _: (s.sum(-1), s), main_grad=MainGrad(weight, scale=0.25)
    )
    with pytest.raises(RuntimeError):
        (loss * 0.5).backward()


def test_only_linear_layers_with_a_gradient_buffer_add_their_gradients_themselves() -> None:
    def layer(*, has_buffer: bool) -> nn.Module:
        module = nn.Linear(2, 2)
        module.fuse_wgrad_accumulation = False  # type: ignore[assignment]
        if has_buffer:
            module.weight.main_grad = torch.zeros(2, 2)  # type: ignore[attr-defined]
        return module

    trained, frozen, other = layer(has_buffer=True), layer(has_buffer=False), nn.Linear(2, 2)
    fuse_weight_gradients(nn.ModuleList([trained, frozen, other]))
    assert trained.fuse_wgrad_accumulation
    assert not frozen.fuse_wgrad_accumulation
    assert not hasattr(other, "fuse_wgrad_accumulation")
