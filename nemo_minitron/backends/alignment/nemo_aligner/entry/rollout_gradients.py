"""Gradients of one step on given rollouts by NeMo-Aligner's models in any layout: for tests against plain formulas."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from checkpoints import save_nemo
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.train_script_utils import (
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
)
from nemo_aligner.utils.utils import load_from_nemo
from safetensors.torch import load_file
from task import Task
from training import prepare


def gradients(task: Task) -> dict[str, Any]:
    """Write to `out` a NeMo checkpoint with the gradients of one optimizer step in place of the weights.

    `method` is reinforce, ppo or critic, and `config` its complete config. `inputs` has the answers of all
    data-parallel ranks with what `generate_reinforce_data` or `generate_ppo_data` reads. `start` is where the weights
    are written, with the new head of a critic.

    Returns:
        `loss` of the step, and `schedule_steps`, the optimizer steps of NeMo's learning-rate schedule.
    """
    method: str = task["method"]
    model, trainer_config = _loaded(task, method)
    save_nemo(model, Path(task["start"]))
    batch = _share(method, trainer_config, load_file(task["inputs"]))
    model.prepare_for_training()
    model.zero_grad()
    model.prepare_for_training_step()
    loss, _ = model.get_loss_and_metrics(batch=batch, forward_only=False)
    model.finish_training_step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    save_nemo(model, Path(task["out"]))
    _, schedule = extract_optimizer_scheduler_from_ptl_model(model)
    return {"loss": loss, "schedule_steps": schedule.max_steps}


def _loaded(task: Task, method: str) -> tuple[Any, Any]:
    """Return the model in its layout, and the settings of its trainer."""
    model_class: type[Any]
    if method == "reinforce":
        from reinforce import MegatronGPTReinforceActorModel

        section, model_class = "reinforce", MegatronGPTReinforceActorModel
    else:
        from ppo import MegatronGPTActorModel, MegatronGPTCriticModel

        section, model_class = "ppo", MegatronGPTActorModel if method == "ppo" else MegatronGPTCriticModel
    config, trainer = prepare(task, section)
    model = load_from_nemo(
        model_class,
        config.model,
        trainer,
        strict=True,
        restore_path=task["nemo"],
        load_base_model_only=method == "critic",
    )
    init_distributed(trainer, model, config.model.get("transformer_engine", False))
    init_using_ptl(trainer, model, None, None)
    return model, SimpleNamespace(**{**config.trainer[section], **task["settings"]})


def _share(method: str, settings: Any, answers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return this data-parallel rank's part of the data of a step, made as in a training."""
    trainer = SimpleNamespace(cfg=settings, compute_init_policy_kl=True)
    if method == "reinforce":
        from reinforce import Trainer

        trainer.whole_reinforce_data = partial(Trainer.whole_reinforce_data, trainer)
        data, _ = Trainer.generate_reinforce_data(trainer, answers)
        return dict(data)
    from ppo import PPORolloutBatch
    from ppo import Trainer as PpoTrainer

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    data, _ = PpoTrainer.generate_ppo_data(trainer, PPORolloutBatch(answers).chunk(rank, ranks, seed=0))
    if method == "ppo":
        return dict(data)
    # The actor's client gathers these, and the critic's server divides them over its ranks again.
    names = {"tokens": "response_tokens", "returns": "returns", "prev_values": "values", "mask": "mask"}
    return {name: data[key] for name, key in names.items()}
