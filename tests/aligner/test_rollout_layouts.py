"""Losses and gradients of trainings on rewards on two processes, for a whole model, against plain formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_minitron.backends.alignment.base import TaskContext
from nemo_minitron.backends.alignment.nemo_aligner.config import complete_config
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.backends.alignment.nemo_aligner.rollout_keys import actor_keys, critic_keys
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.schema.execution import Parallel
from tests.aligner.test_rollout_losses import LENGTH, PPO_KEYS, plain_ppo, plain_reinforce, rollouts
from tests.support.aligner import Border, quiet, reward_head
from tests.support.tiny_models import load_transformers, tiny_model_dir
from tests.unit.test_rollout_rules import CRITIC
from tests.unit.test_rollout_rules import rollouts as settings_of

pytestmark = pytest.mark.slow

LAYOUTS = {"pp2": Parallel(pp=2), "dp2": Parallel(dp=2)}
PENALTY = 0.3
STEPS = 3
"""Optimizer steps for the answers of each step."""
PARTS = {
    "reinforce": {"initial_policy_kl_penalty": PENALTY, "use_absolute_kl": True},
    "ppo": {**PPO_KEYS, "use_absolute_kl": False, "normalize_advantages": False},
    "critic": {**PPO_KEYS, "use_absolute_kl": False, "normalize_advantages": False},
}
"""What computes a gradient -> settings of its trainer."""


@pytest.fixture(scope="module")
def border(tmp_path_factory: pytest.TempPathFactory) -> Border:
    """A model whose embeddings are tied, so that the first and the last stage of a pipeline share them."""
    root = tmp_path_factory.mktemp("layouts")
    return Border(tiny_model_dir(root, "llama_gqa_tied"), root / "work", seq_len_tokens=64).cross()


def answers(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Random answers and the model's logits; no token is the end of text, at which NeMo-Aligner's critic cuts texts."""
    generator = torch.Generator().manual_seed(seed)
    rows = rollouts(seed)
    count = len(rows["rewards"])
    tokens = torch.randint(1, 400, (count, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].float()
    logprobs = chosen + 0.3 * torch.randn(chosen.shape, generator=generator)
    return {
        **rows,
        "logits": logits,
        "response_tokens": tokens,
        "logprobs": logprobs,
        "init_logprobs": logprobs - 0.1 * torch.randn(logprobs.shape, generator=generator),
        "values": torch.randn(count, LENGTH - 1, generator=generator),
    }


def by_aligner(
    part: str, rows: dict[str, torch.Tensor], border: Border, layout: Parallel, work: Path
) -> tuple[float, Path, Path]:
    """Return the loss, and checkpoints of the weights and of the gradients."""
    critic = None if part == "reinforce" else replace(CRITIC, value_clip=PPO_KEYS["loss_clip_val"])
    count = len(rows["rewards"])
    settings = replace(
        settings_of(critic, work),
        max_seq_len_tokens=64,
        prompts_per_step=STEPS * count // 4 if critic is None else STEPS * count,
        global_batch_size=count,
    )
    context = TaskContext("rl", work, layout, "cpu", 1, *quiet())
    if part == "critic":
        assert critic is not None
        keys = {
            **critic_keys(settings, critic, border.nemo, work),
            "trainer.devices": layout.world_size,
            "exp_manager.checkpoint_callback_params.model_parallel_size": layout.pp,
            "model.pipeline_model_parallel_size": layout.pp,
        }
    else:
        keys = actor_keys(settings, border.nemo, context)
    work.mkdir()
    save_file({name: tensor for name, tensor in rows.items() if name != "logits"}, work / "inputs.safetensors")
    task = {
        "method": part,
        "config": complete_config(part, keys, {}, on_cpu=True, where="test"),  # type: ignore[arg-type]
        "nemo": str(border.nemo),
        "inputs": str(work / "inputs.safetensors"),
        "settings": PARTS[part],
        "start": str(work / "start"),
        "out": str(work / "gradients"),
    }
    processes = layout.world_size
    found = run_task(
        "rollout_gradients", task, work / "task", work / "log.txt", *quiet(), num_processes=processes, threads=1
    )
    extra = 0 if part != "critic" or critic is None else critic.warmup_steps
    assert found["schedule_steps"] == STEPS * (settings.num_steps + extra)
    return found["loss"], work / "start", work / "gradients"


def by_formula(
    part: str, rows: dict[str, torch.Tensor], model: Any, head: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss and the gradients of the head, while those of the model are left in its parameters."""
    if head is None:
        logits = model(rows["response_tokens"]).logits
        plain = plain_reinforce(rows, PENALTY) if part == "reinforce" else plain_ppo(rows, PPO_KEYS)
        logits.backward(plain["grad"])
        return plain["loss"], []
    weight, bias = (tensor.double().requires_grad_() for tensor in head)
    hidden = model.model(rows["response_tokens"]).last_hidden_state
    values = (hidden @ weight.T + bias)[..., 0]
    plain = plain_ppo({**rows, "new_values": values.detach()}, PPO_KEYS, critic_by_answer=True)
    values.backward(plain["critic_grad"])
    assert weight.grad is not None
    assert bias.grad is not None
    return plain["critic_loss"], [weight.grad, bias.grad]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", PARTS)
def test_loss_and_gradient_are_their_formula(part: str, layout: str, border: Border, tmp_path: Path) -> None:
    model = load_transformers(border.model, torch.float64)
    rows = answers(model, seed=len(part))
    rows["new_values"] = torch.zeros(len(rows["rewards"]), LENGTH)  # those of the critic come from its head
    loss, start, gradients = by_aligner(part, rows, border, LAYOUTS[layout], tmp_path / "aligner")
    is_critic = part == "critic"
    expected, of_head = by_formula(part, rows, model, reward_head(start) if is_critic else None)
    torch.testing.assert_close(torch.tensor(loss, dtype=torch.float64), expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(reward_head(gradients) if is_critic else (), of_head, strict=True):
        torch.testing.assert_close(found.double().reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)
    found_gradients = Checkpoint.open(border.back(tmp_path / "gradients", gradients))
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None)
    assert largest > 1e-3
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            found_gradients.read(name).double(), wanted, rtol=1e-5, atol=1e-6 * max(1.0, largest), msg=name
        )
