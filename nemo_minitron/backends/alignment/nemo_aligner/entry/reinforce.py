"""REINFORCE with the other answers to a prompt as the baseline (RLOO, 2402.14740)."""

from __future__ import annotations

from typing import Any

import torch
import without_tensorrt
from task import Task

with without_tensorrt.importable():
    from nemo_aligner.algorithms.reinforce import ReinforceTrainer
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import all_reduce_dict
from nemo_aligner.utils.ppo_utils import create_mask
from rollouts import Algorithm, Answers, kl_nats, standard_error
from rollouts import train as train_with


def train(task: Task) -> dict[str, Any]:
    """Train on the prompts {"text"} of the config with the rewards of a server."""
    import triton_socket

    triton_socket.prepare()
    algorithm = Algorithm(
        key="reinforce",
        model_class=MegatronGPTReinforceActorModel,
        make_trainer=_Trainer,
        make_client=lambda config: RemoteGPTRMClient(config.remote_rm),
        client_argument="rm",
    )
    return train_with(task, algorithm)


class _Trainer(ReinforceTrainer):  # type: ignore[misc]
    """NeMo-Aligner's trainer with more metrics: KL divergence, log-probabilities, standard errors, and answers."""

    answers: Answers

    def _run_inference(self, dataloader_builder: Any, consumed_samples: int, is_validation: bool) -> Any:
        self._is_validation = is_validation
        batch, metrics = super()._run_inference(dataloader_builder, consumed_samples, is_validation)
        if is_validation:
            batch["init_logprobs"] = self.model.get_init_policy_logprobs(batch["response_tokens"])
        return batch, {**metrics, **_policy_metrics(batch)}

    def compute_rollout_metrics(self, rollout_batch: Any) -> Any:
        metrics = super().compute_rollout_metrics(rollout_batch)
        if self._is_validation:
            metrics["rewards_se"] = standard_error(rollout_batch["rewards"])
            self.answers.write(self.step, rollout_batch, self.model.tokenizer)
        return metrics


def _policy_metrics(batch: Any) -> dict[str, float]:
    """Return the mean KL divergence and log-probability per token, over all data-parallel ranks."""
    mask = create_mask(
        values=batch["logprobs"], prompt_lengths=batch["prompt_lengths"], response_lengths=batch["response_lengths"]
    )
    sums = {"log_prob": float((batch["logprobs"] * mask).sum()), "tokens": float(mask.sum())}
    if "init_logprobs" in batch:
        sums["kl"] = kl_nats(batch["logprobs"], batch["init_logprobs"], mask) * sums["tokens"]
    total = all_reduce_dict(sums, group=parallel_state.get_data_parallel_group(), op=torch.distributed.ReduceOp.SUM)
    tokens = max(1.0, float(total.pop("tokens")))
    return {name: float(value) / tokens for name, value in total.items()}
