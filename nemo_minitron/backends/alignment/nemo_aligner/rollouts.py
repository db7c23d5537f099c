"""Trainings on rewards: convert the model, start the servers, train, convert back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import ANSWERS_FILE, CURVES_FILE, ModelReward, Rollouts, TaskContext
from nemo_minitron.backends.alignment.nemo_aligner.config import complete_config
from nemo_minitron.backends.alignment.nemo_aligner.context import log_file, on_cpu, task_server
from nemo_minitron.backends.alignment.nemo_aligner.fork_server import ForkServer
from nemo_minitron.backends.alignment.nemo_aligner.last_checkpoint import keep_last_checkpoint
from nemo_minitron.backends.alignment.nemo_aligner.model_config import REWARD_DIR, tokenizer_dir
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.backends.alignment.nemo_aligner.remote_servers import serving
from nemo_minitron.backends.alignment.nemo_aligner.rollout_keys import (
    CRITIC_SOCKET,
    REWARD_MODEL_SOCKET,
    REWARD_SOCKET,
    actor_keys,
    critic_keys,
    critic_steps,
)
from nemo_minitron.backends.alignment.nemo_aligner.servers import ServerTask, changed_variables
from nemo_minitron.backends.alignment.nemo_aligner.training import (
    CONFIG_FILE,
    convert_back,
    converted,
    start_checkpoint,
)
from nemo_minitron.hf.tokenizer import load_tokenizer


def train_on_rewards(rollouts: Rollouts, out_dir: Path, context: TaskContext) -> Path:
    """Train, and write a Hugging Face model with curves and answers to `out_dir`; returns the file of the curves."""
    cpu, work = on_cpu(context), context.work_dir / "training"
    nemo, trained = start_checkpoint(context), context.work_dir / "trained"
    with task_server(rollouts.method, context, on_cpu=cpu) as server:
        model_config = converted(rollouts.model_dir, rollouts.max_seq_len_tokens, nemo, context, server, on_cpu=cpu)
        _run_actor(rollouts, nemo, trained, work, context, server, on_cpu=cpu)
        for file in (work / CURVES_FILE, work / ANSWERS_FILE, context.work_dir / CONFIG_FILE):
            shutil.copyfile(file, out_dir / file.name)
        convert_back(trained, model_config, rollouts.model_dir, out_dir, context, server, on_cpu=cpu)
    return out_dir / CURVES_FILE


def _run_actor(
    rollouts: Rollouts,
    nemo: Path,
    trained: Path,
    work: Path,
    context: TaskContext,
    server: ForkServer | None,
    *,
    on_cpu: bool,
) -> None:
    """Start the servers of rewards and train; `server` runs the training."""
    complete = complete_config(
        rollouts.method,
        actor_keys(rollouts, nemo, context),
        rollouts.overrides,
        on_cpu=on_cpu,
        where=f"stages.{context.stage}",
    )
    (context.work_dir / CONFIG_FILE).write_text(json.dumps(complete, indent=2))
    servers_to_start = _servers(rollouts, nemo, keep_last_checkpoint(work), context, on_cpu)
    with serving(servers_to_start, context, on_cpu=on_cpu) as servers:
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
            on_cpu=on_cpu,
            variables=servers.variables,
            watch=servers.watch,
            server=server,
        )


def _servers(rollouts: Rollouts, nemo: Path, actor_step: int, context: TaskContext, cpu: bool) -> list[ServerTask]:
    """Return the servers that an actor needs which resumes from its checkpoint of `actor_step`; 0: it has none."""
    servers = [_rule_server(rollouts, nemo, context, cpu)]
    if rollouts.critic is not None:
        work = context.work_dir / "critic"
        keep_last_checkpoint(work)
        config = complete_config(
            "critic",
            critic_keys(rollouts, rollouts.critic, nemo, work),
            {},
            on_cpu=cpu,
            where=f"stages.{context.stage}",
        )
        task = {
            "config": config,
            "nemo": str(nemo),
            "base_model_only": True,
            "step": critic_steps(rollouts, actor_step),
        }
        servers.append(ServerTask("critic_server", CRITIC_SOCKET, task, work))
    if rollouts.reward_model is not None:
        # The last of the servers, so that it is on the node of the first, which calls it (`serving`).
        servers.append(_reward_model_server(rollouts.reward_model, rollouts.generation_batch_size, context))
    return servers


def _rule_server(rollouts: Rollouts, nemo: Path, context: TaskContext, cpu: bool) -> ServerTask:
    task: dict[str, Any] = {
        "prompts": [str(rollouts.train_prompts), str(rollouts.valid_prompts)],
        "tokenizer": str(tokenizer_dir(nemo)),
        "ends": ends_of_answers(rollouts),
        "evaluator": list(rollouts.evaluator),
        "reward_model": _client(rollouts.reward_model),
        "changed_variables": changed_variables(on_cpu=cpu),
    }
    return ServerTask("rule_server", REWARD_SOCKET, task, context.work_dir / "rule_server")


def ends_of_answers(rollouts: Rollouts) -> list[str]:
    """Return the texts at which NeMo's generation ends an answer: that of the template, and the end-of-text token."""
    end_of_text = load_tokenizer(rollouts.model_dir).eos_token
    return [rollouts.stop] if end_of_text in (None, rollouts.stop) else [rollouts.stop, end_of_text]


def _client(reward: ModelReward | None) -> dict[str, Any] | None:
    """Return what the server of the summed rewards needs to call that of the reward model."""
    return None if reward is None else {"number": REWARD_MODEL_SOCKET, "weight": reward.weight}


def _reward_model_server(reward: ModelReward, batch_size: int, context: TaskContext) -> ServerTask:
    nemo = reward.model_dir / REWARD_DIR
    weights = reward.attribute_weights
    task = {
        "nemo": str(nemo),
        "tokenizer": str(tokenizer_dir(nemo)),
        "attribute_weights": None if weights is None else list(weights),
        "batch_size": batch_size,
    }
    return ServerTask("reward_model_server", REWARD_MODEL_SOCKET, task, context.work_dir / "reward_model_server")
