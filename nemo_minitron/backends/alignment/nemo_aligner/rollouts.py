"""Trainings on rewards: convert the model, start the servers, train, convert back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import ANSWERS_FILE, CURVES_FILE, Rollouts, TaskContext
from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.config import complete_config
from nemo_minitron.backends.alignment.nemo_aligner.context import conversion_dir, log_file, on_cpu, trainer_keys
from nemo_minitron.backends.alignment.nemo_aligner.model_config import tokenizer_dir
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.backends.alignment.nemo_aligner.servers import ServerTask, running
from nemo_minitron.backends.alignment.nemo_aligner.training import CONFIG_FILE, converted, start_checkpoint
from nemo_minitron.processes.nodes import Nodes

REWARD_SOCKET = 1
MICRO_BATCH_SIZE = 1
"""NeMo-Aligner's loss multiplies log-probabilities [B, S] by advantages [B], which fails for more. For one answer it is
the mean over its tokens, so the loss of a step is the mean over answers of these means, in every layout."""


def train_on_rewards(rollouts: Rollouts, out_dir: Path, context: TaskContext) -> Path:
    """Train, and write a Hugging Face model with curves and answers to `out_dir`; returns the file of the curves."""
    cpu, work = on_cpu(context), context.work_dir / "training"
    nemo, trained = start_checkpoint(context), context.work_dir / "trained"
    model_config = converted(rollouts.model_dir, rollouts.max_seq_len_tokens, nemo, context, cpu)
    complete = complete_config(
        rollouts.method,
        _keys(rollouts, nemo, context),
        rollouts.overrides,
        on_cpu=cpu,
        where=f"stages.{context.stage}",
    )
    (context.work_dir / CONFIG_FILE).write_text(json.dumps(complete, indent=2))
    threads = context.threads or Nodes.here().threads_of_each(context.layout.world_size)
    with running([_rule_server(rollouts, nemo, context)], threads, context.stop, on_cpu=cpu) as servers:
        run_task(
            rollouts.method,
            {"config": complete, "nemo": str(nemo), "out": str(trained)},
            work,
            log_file(context),
            context.progress,
            context.stop,
            num_processes=context.layout.world_size,
            threads=context.threads,
            stage_work=context.work_dir,
            on_cpu=cpu,
            variables=servers.variables,
            watch=servers.watch,
        )
    for file in (work / CURVES_FILE, work / ANSWERS_FILE, context.work_dir / CONFIG_FILE):
        shutil.copyfile(file, out_dir / file.name)
    convert.from_nemo(
        trained,
        model_config,
        rollouts.model_dir,
        out_dir,
        conversion_dir(context),
        log_file(context),
        context.progress,
        context.stop,
        on_cpu=cpu,
    )
    return out_dir / CURVES_FILE


def _rule_server(rollouts: Rollouts, nemo: Path, context: TaskContext) -> ServerTask:
    task: dict[str, Any] = {
        "prompts": [str(rollouts.train_prompts), str(rollouts.valid_prompts)],
        "tokenizer": str(tokenizer_dir(nemo)),
        "stop": rollouts.stop,
        "evaluator": list(rollouts.evaluator),
        # That of the runner: the server's own environment is NeMo-Aligner's.
        "evaluator_environment": dict(os.environ),
    }
    return ServerTask("rule_server", REWARD_SOCKET, task, context.work_dir / "rule_server")


def _keys(rollouts: Rollouts, nemo: Path, context: TaskContext) -> dict[str, Any]:
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
        **_sizes(rollouts, key),
        "trainer.max_epochs": num_epochs,
        "trainer.max_steps": rollouts.num_steps,
        f"trainer.{key}.max_epochs": num_epochs,
        f"trainer.{key}.max_steps": rollouts.num_steps,
        f"trainer.{key}.val_check_interval": interval,
        f"trainer.{key}.save_interval": interval,
        f"trainer.{key}.initial_policy_kl_penalty": rollouts.kl_penalty,
        f"trainer.{key}.num_rollouts_per_prompt": rollouts.answers_per_prompt,
        **{f"{part}.{key}.trt_llm.{name}": trt_llm[name] for part in ("trainer", "model") for name in trt_llm},
        "remote_rm.pad_to_length": None,
        "remote_rm.reward_model.ip": "localhost",
        "remote_rm.reward_model.port": REWARD_SOCKET,
        "exp_manager.explicit_log_dir": str(context.work_dir / "training" / "nemo_experiment"),
        "exp_manager.checkpoint_callback_params.model_parallel_size": layout.tp * layout.pp,
        "pretrained_checkpoint.restore_from_path": str(nemo),
        "model.seed": rollouts.seed,
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.sequence_parallel": layout.sequence_parallel,
        "model.micro_batch_size": MICRO_BATCH_SIZE,
        "model.optim.lr": rollouts.lr,
        "model.optim.sched.warmup_steps": rollouts.warmup_steps,
        "model.optim.sched.min_lr": rollouts.min_lr,
        "model.data.data_prefix": {"train": [str(rollouts.train_prompts)], "validation": valid, "test": valid},
    }


def _sizes(rollouts: Rollouts, key: str) -> dict[str, Any]:
    """Return the config keys of batches and lengths."""
    at_once, length = rollouts.generation_batch_size, rollouts.max_seq_len_tokens
    return {
        f"trainer.{key}.model_gbs": rollouts.global_batch_size,
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
