"""Config keys of trainings on rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import Critic, Rollouts, TaskContext
from nemo_minitron.backends.alignment.nemo_aligner.context import trainer_keys
from nemo_minitron.backends.alignment.nemo_aligner.last_checkpoint import EXPERIMENT_DIR

REWARD_SOCKET, CRITIC_SOCKET, REWARD_MODEL_SOCKET = 1, 2, 3
"""Numbers of the servers: of the summed rewards, of the critic, and of the reward model."""
MICRO_BATCH_SIZE = 1
"""NeMo-Aligner's loss multiplies log-probabilities [B, S] by advantages [B], which fails for more. For one answer it is
the mean over its tokens, so the loss of a step is the mean over answers of these means, in every layout."""


def actor_keys(rollouts: Rollouts, nemo: Path, context: TaskContext) -> dict[str, Any]:
    """Return the config keys of the actor."""
    key, layout = rollouts.method, context.layout
    interval = min(rollouts.valid_interval_steps, rollouts.num_steps)
    steps_per_epoch = max(1, rollouts.num_train_prompts // rollouts.prompts_per_step)
    num_epochs = -(-rollouts.num_steps // steps_per_epoch)
    trt_llm = {
        "enable": False,
        "reshard": False,
        "max_input_len": rollouts.max_seq_len_tokens - rollouts.max_new_tokens,
        "model_type": "llama",
    }
    valid = [str(rollouts.valid_prompts)]
    return {
        **trainer_keys(layout),
        **_sizes(rollouts, key, split_sequences=layout.sequence_parallel and layout.tp > 1),
        "trainer.max_epochs": num_epochs,
        # The length of the learning-rate schedule, which counts optimizer steps.
        "trainer.max_steps": rollouts.num_steps * _optimizer_steps(rollouts),
        f"trainer.{key}.max_epochs": num_epochs,
        f"trainer.{key}.max_steps": rollouts.num_steps,
        f"trainer.{key}.val_check_interval": interval,
        f"trainer.{key}.save_interval": interval,
        f"trainer.{key}.initial_policy_kl_penalty": rollouts.kl_penalty,
        **{f"{part}.{key}.trt_llm.{name}": trt_llm[name] for part in ("trainer", "model") for name in trt_llm},
        **_own_keys(rollouts),
        "exp_manager.explicit_log_dir": str(context.work_dir / "training" / EXPERIMENT_DIR),
        "exp_manager.checkpoint_callback_params.model_parallel_size": layout.tp * layout.pp,
        "pretrained_checkpoint.restore_from_path": str(nemo),
        "model.seed": rollouts.seed,
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.sequence_parallel": layout.sequence_parallel,
        "model.micro_batch_size": MICRO_BATCH_SIZE if rollouts.critic is None else layout.micro_batch_size,
        "model.optim.lr": rollouts.lr,
        "model.optim.sched.warmup_steps": rollouts.warmup_steps,
        "model.optim.sched.min_lr": rollouts.min_lr,
        "model.data.data_prefix": {"train": [str(rollouts.train_prompts)], "validation": valid, "test": valid},
    }


def _sizes(rollouts: Rollouts, key: str, *, split_sequences: bool) -> dict[str, Any]:
    """Return the config keys of batches and lengths."""
    at_once, length = rollouts.generation_batch_size, rollouts.max_seq_len_tokens
    return {
        f"trainer.{key}.model_gbs": rollouts.global_batch_size,
        # Sequence parallelism splits sequences evenly; batches as long as their longest answer cannot always be split.
        f"trainer.{key}.rollout_batch_seq_length": length if split_sequences else None,
        "model.global_batch_size": rollouts.global_batch_size,
        "model.encoder_seq_length": length,
        "model.max_position_embeddings": length,
        "model.data.seq_length": length,
        f"model.{key}.rollout_micro_batch_size": at_once,
        f"model.{key}.num_rollout_samples": rollouts.prompts_per_step,
        f"model.{key}.forward_micro_batch_size": at_once,
        f"model.{key}.val_rollout_micro_batch_size": at_once,
        f"model.{key}.num_val_samples": rollouts.num_valid_prompts,
        f"model.{key}.sampling_params.temperature": rollouts.temperature,
        f"model.{key}.sampling_params.end_strings": [rollouts.stop],
        f"model.{key}.length_params.max_length": rollouts.max_new_tokens,
    }


def _own_keys(rollouts: Rollouts) -> dict[str, Any]:
    """Return the config keys that only one of the algorithms has."""
    critic = rollouts.critic
    if critic is None:
        return {
            "trainer.reinforce.num_rollouts_per_prompt": rollouts.answers_per_prompt,
            "remote_rm.pad_to_length": None,
            "remote_rm.reward_model.ip": "localhost",
            "remote_rm.reward_model.port": REWARD_SOCKET,
        }
    sockets = {"reward_model": REWARD_SOCKET, "critic": CRITIC_SOCKET}
    return {
        "trainer.ppo.critic_warmup_steps": critic.warmup_steps,
        "trainer.ppo.discount_factor": critic.discount_factor,
        "trainer.ppo.gae_lambda": critic.gae_lambda,
        "model.ppo.ratio_eps": critic.ratio_clip,
        "model.ppo.entropy_bonus": critic.entropy_bonus,
        "remote_critic_rm.pad_to_length": None,
        **{f"remote_critic_rm.{name}.ip": "localhost" for name in sockets},
        **{f"remote_critic_rm.{name}.port": number for name, number in sockets.items()},
    }


def critic_keys(rollouts: Rollouts, critic: Critic, nemo: Path, work_dir: Path) -> dict[str, Any]:
    """Return the config keys of the critic's server, which has one process."""
    steps = critic_steps(rollouts, rollouts.num_steps)
    return {
        "trainer.num_nodes": 1,
        "trainer.devices": 1,
        "trainer.max_steps": steps,
        "trainer.ppo.max_steps": steps,
        "trainer.ppo.port": CRITIC_SOCKET,
        "trainer.ppo.inference_micro_batch_size": rollouts.generation_batch_size,
        "pretrained_checkpoint.restore_from_path": str(nemo),
        "exp_manager.explicit_log_dir": str(work_dir / EXPERIMENT_DIR),
        "exp_manager.checkpoint_callback_params.model_parallel_size": 1,
        "model.seed": rollouts.seed,
        "model.tensor_model_parallel_size": 1,
        "model.pipeline_model_parallel_size": 1,
        "model.micro_batch_size": 1,
        "model.global_batch_size": rollouts.global_batch_size,
        "model.forward_micro_batch_size": rollouts.generation_batch_size,
        "model.encoder_seq_length": rollouts.max_seq_len_tokens,
        "model.max_position_embeddings": rollouts.max_seq_len_tokens,
        "model.loss_clip_val": critic.value_clip,
        "model.optim.lr": critic.lr,
        "model.optim.sched.warmup_steps": rollouts.warmup_steps,
        "model.optim.sched.min_lr": critic.min_lr,
    }


def critic_steps(rollouts: Rollouts, num_steps: int) -> int:
    """Return the optimizer steps of the critic after this number of the actor's steps."""
    assert rollouts.critic is not None
    extra = rollouts.critic.warmup_steps if num_steps else 0
    return (num_steps + extra) * _optimizer_steps(rollouts)


def _optimizer_steps(rollouts: Rollouts) -> int:
    """Return the optimizer steps in one step of the training."""
    return rollouts.prompts_per_step * rollouts.answers_per_prompt // rollouts.global_batch_size
