"""Preference optimization against a frozen copy of the model: DPO, IPO and the RPO losses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nemo_aligner.algorithms.dpo import DPOTrainer, dpo_custom_collate
from nemo_aligner.data.nlp.builders import build_train_valid_test_dpo_datasets, identity_collate
from nemo_aligner.models.nlp.gpt.megatron_gpt_dpo_model import MegatronGPTDPOModel
from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from task import Task
from training import Loaders, batch_loaders, jsonl_arguments
from training import train as train_with


def train(task: Task) -> dict[str, Any]:
    """Train on rows {"prompt", "chosen_response", "rejected_response"} and rewards, rendered with the chat template."""
    return train_with(task, "dpo", MegatronGPTDPOModel, _loaders, _trainer, after_load=_keep_reference)


def preference_losses(task: Task) -> dict[str, Any]:
    """Write to `out` NeMo-Aligner's own loss and gradient of each case, for the log-probabilities in `inputs`.

    No model is built, because the loss function reads only a few of its attributes.
    """
    inputs, found = load_file(task["inputs"]), {}
    for name, settings in task["cases"].items():
        model = _LossOnly(settings)
        policy = inputs["policy"].clone().requires_grad_()
        rewards = inputs["rewards"]
        loss, _ = MegatronGPTDPOModel.loss_func(
            model, policy, inputs["reference"], inputs["labels"], rewards, average_log_probs=settings["average"]
        )
        found[f"{name}.loss"], found[f"{name}.grad"] = (
            loss.detach().reshape(1),
            torch.autograd.grad(loss, policy)[0].contiguous(),
        )
    save_file(found, task["out"])
    return {}


class _LossOnly:
    """Attributes of the model that MegatronGPTDPOModel.loss_func reads."""

    split_output_tensor = MegatronGPTDPOModel.split_output_tensor
    get_reduced_masked_logps = MegatronGPTDPOModel.get_reduced_masked_logps

    def __init__(self, settings: dict[str, Any]) -> None:
        self.preference_loss = settings["kind"]
        self.ref_policy_kl_penalty = settings["beta"]
        self.gt_reward_scale = settings["reward_scale"]


def _trainer(**kwargs: Any) -> DPOTrainer:
    model = kwargs["model"]
    data = model.cfg.data
    collate = partial(
        dpo_custom_collate,
        eos_id=model.tokenizer.eos_id,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
    )
    # The trainer passes its own multiple to the function.
    return DPOTrainer(collate_fn=collate, pad_length_to_multiple_of=data.pad_length_to_multiple_of, **kwargs)


def _keep_reference(model: Any, config: DictConfig) -> None:
    model.ref_policy_state_dict = retrieve_model_state_dict_in_cpu(
        model, megatron_amp_O2=config.model.get("megatron_amp_O2", False)
    )


def _loaders(config: DictConfig, model: Any, consumed_samples: int) -> Loaders:
    train_dataset, valid_dataset, _ = build_train_valid_test_dpo_datasets(**jsonl_arguments(config, model))
    return batch_loaders(config, train_dataset, valid_dataset, consumed_samples, identity_collate)
