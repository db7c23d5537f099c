"""NeMo-Aligner's own losses of rollouts for given logits, without a model: for tests against plain formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from task import Task, is_main

Tensors = dict[str, torch.Tensor]


def reinforce(task: Task) -> dict[str, Any]:
    """Write to `out` the loss of a step of REINFORCE, its gradient for the logits [B, S, V], and the baselines.

    `inputs` has "logits" and what `ReinforceTrainer.generate_reinforce_data` reads; `settings` its config keys. With
    several processes the vocabulary is split over them.
    """
    from reinforce import MegatronGPTReinforceActorModel, Trainer

    inputs = _prepared(task)
    settings = SimpleNamespace(**task["settings"])
    trainer = SimpleNamespace(cfg=settings, compute_init_policy_kl=True)
    data, _ = Trainer.whole_reinforce_data(trainer, inputs)
    loss, gradient = _step(MegatronGPTReinforceActorModel, None, inputs["logits"], data)
    _save(task, {"loss": loss, "grad": gradient, "baseline": data["baseline"]})
    return {}


def ppo(task: Task) -> dict[str, Any]:
    """Write to `out` the losses of actor and critic in a step of PPO, their gradients, advantages and returns.

    `inputs` has "logits" and what `PPOTrainer.generate_ppo_data` reads, and "new_values" [B, S] of the critic that is
    trained; `settings` has the config keys of trainer, actor and critic.
    """
    from ppo import MegatronGPTActorModel, MegatronGPTCriticModel, Trainer

    inputs = _prepared(task)
    settings = SimpleNamespace(**task["settings"])
    trainer = SimpleNamespace(cfg=settings, compute_init_policy_kl=True)
    data, _ = Trainer.generate_ppo_data(trainer, inputs)
    loss, gradient = _step(MegatronGPTActorModel, settings, inputs["logits"], data)
    values = inputs["new_values"].clone().requires_grad_()
    critic = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_id=0), enable_standardization=False, clip_val=settings.loss_clip_val
    )
    batch = {"tokens": data["response_tokens"], "prev_values": data["values"]}
    batch |= {name: data[name] for name in ("returns", "mask")}
    function = MegatronGPTCriticModel.get_forward_output_and_loss_func(critic)
    output, loss_function = function(iter([batch]), lambda **_: values)
    critic_loss = loss_function(output)[0]
    critic_gradient = torch.autograd.grad(critic_loss, values)[0]
    found = {"loss": loss, "grad": gradient, "critic_loss": critic_loss.detach(), "critic_grad": critic_gradient}
    _save(task, {**found, "advantages": data["advantages"], "returns": data["returns"]})
    return {}


def _prepared(task: Task) -> Tensors:
    """Set up Megatron's groups, and return the inputs with this rank's part of the logits."""
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    inputs: Tensors = load_file(task["inputs"])
    rank = parallel_state.get_tensor_model_parallel_rank()
    return {**inputs, "logits": inputs["logits"].chunk(size, dim=-1)[rank].contiguous()}


def _step(model_class: Any, settings: Any, logits: torch.Tensor, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a step with micro-batches of one answer, and its gradient for all logits."""
    leaf = logits.clone().requires_grad_()
    function = model_class.get_actor_forward_output_and_loss_func(settings)
    losses = []
    for index in range(len(leaf)):
        batch = {name: data[name][index : index + 1] for name in data}
        batch |= {"attention_mask": torch.empty(1), "position_ids": torch.empty(1)}
        model = lambda *args, labels, index=index: leaf[index : index + 1]  # noqa: E731
        output, loss_function = function(iter([batch]), model)
        losses.append(loss_function(output)[0])
    loss = torch.stack(losses).mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _save(task: Task, found: Tensors) -> None:
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(found["grad"]) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, found["grad"].contiguous(), group=group)
    if is_main():
        whole = {**found, "grad": torch.cat(parts, dim=-1)}
        save_file(
            {name: tensor.reshape(-1) if tensor.dim() == 0 else tensor.contiguous() for name, tensor in whole.items()},
            task["out"],
        )
