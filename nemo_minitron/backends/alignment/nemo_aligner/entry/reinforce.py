"""REINFORCE with the other answers to a prompt as the baseline (RLOO, 2402.14740)."""

from __future__ import annotations

from typing import Any

import without_tensorrt
from task import Task

with without_tensorrt.importable():
    from nemo_aligner.algorithms.reinforce import ReinforceTrainer
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient
from nemo_aligner.utils import parallel_state
from rollouts import Algorithm, Measured
from rollouts import train as train_with


def train(task: Task) -> dict[str, Any]:
    """Train on the prompts {"text"} of the config with the rewards of a server."""
    import triton_socket

    triton_socket.prepare()
    algorithm = Algorithm(
        key="reinforce",
        model_class=MegatronGPTReinforceActorModel,
        make_trainer=Trainer,
        make_client=lambda config: RemoteGPTRMClient(config.remote_rm),
        client_argument="rm",
    )
    return train_with(task, algorithm)


class Trainer(Measured, ReinforceTrainer):  # type: ignore[misc]
    """NeMo-Aligner's trainer with more metrics, all prompts of an epoch, and answers split over data-parallel ranks."""

    consumed_samples: int
    whole_reinforce_data = ReinforceTrainer.generate_reinforce_data

    def generate_rollouts(self) -> Any:
        """Count the prompts of the step as consumed: NeMo-Aligner counts their answers, and skips as many prompts."""
        before = self.consumed_samples
        data, metrics, times = super().generate_rollouts()
        self.consumed_samples = before + metrics["rollout_size"] // self.cfg.num_rollouts_per_prompt
        return data, {**metrics, "consumed_samples": self.consumed_samples}, times

    def generate_reinforce_data(self, rollout_batch: Any) -> Any:
        """Keep this rank's part of the answers: NeMo-Aligner would train every data-parallel rank on all of them."""
        data, metrics = self.whole_reinforce_data(rollout_batch)
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        part = self.cfg.model_gbs // ranks
        return {
            name: rows.unflatten(0, (-1, ranks, part))[:, rank].flatten(0, 1) for name, rows in data.items()
        }, metrics
