"""PPO and REINFORCE: settings -> complete configs of NeMo-Aligner's two programs, and the scripts that start them.

The server holds the reward model and, for PPO, the critic. The actor is trained and sends requests to the server. The
programs need TensorRT-LLM or PyTriton, which NeMo's containers have.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.backends.alignment.nemo_aligner.config import Method, complete_config
from nemo_minitron.backends.alignment.nemo_aligner.rlhf_checks import RlhfFacts, rollouts_per_step, steps_per_epoch
from nemo_minitron.backends.alignment.nemo_aligner.shipped import HOME, HOME_VARIABLE
from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.schema.rlhf import Rlhf, RlhfLayout

GPT = "examples/nlp/gpt"
PROMPT_FILES = {"train": "prompts/train.jsonl", "valid": "prompts/valid.jsonl"}
ACTOR_NEMO = "actor_start"
END_OF_TEXT = "<|endoftext|>"
"""End string that NeMo's generation replaces by the tokenizer's end-of-text token."""
TRT_MODEL_TYPES = {"swiglu": "llama", "squared_relu": "gptnext"}
"""Activation -> model type for NeMo's export to TensorRT-LLM."""


@dataclass(frozen=True)
class Programs:
    """Configs and scripts of NeMo-Aligner for one algorithm."""

    server: Method
    server_script: str
    actor: Method
    actor_script: str
    section: str
    """Name of the actor's section below `trainer` and `model`."""


PROGRAMS: Mapping[str, Programs] = {
    "ppo": Programs("ppo_critic", "serve_ppo_critic.py", "ppo_actor", "train_gpt_ppo_actor.py", "ppo"),
    "reinforce": Programs(
        "reward_server", "serve_reward_model.py", "reinforce_actor", "train_gpt_reinforce_actor.py", "reinforce"
    ),
}


def render(settings: Rlhf, facts: RlhfFacts, out: Path) -> dict[str, str]:
    """Return file name below `out` -> text: two configs, and the scripts server.sh, actor.sh and back.sh.

    Args:
        settings: settings in which `rlhf_problems` finds no problem.
        out: absolute path of the output folder; the configs contain it.

    Raises:
        ConfigError: a key of `actor` or `server` that NeMo-Aligner does not read, or a value out of range.
    """
    programs = PROGRAMS[settings.algorithm]
    server = complete_config(
        programs.server, _server(settings, facts, out), settings.server, on_cpu=False, where="server"
    )
    actor = complete_config(programs.actor, _actor(settings, facts, out), settings.actor, on_cpu=False, where="actor")
    for config in (server, actor):
        config["model"]["precision"] = config["trainer"]["precision"]
    actor["model"][programs.section]["trt_llm"] = dict(actor["trainer"][programs.section]["trt_llm"])
    return {
        f"{programs.server}.yaml": yaml.safe_dump(server, sort_keys=False),
        f"{programs.actor}.yaml": yaml.safe_dump(actor, sort_keys=False),
        "server.sh": _server_script(settings, programs, out),
        "actor.sh": _actor_script(settings, programs, out),
        "back.sh": _back_script(programs, facts, out),
    }


def _optimizer_steps(settings: Rlhf) -> int:
    """Return the optimizer steps of a training, which the learning-rate schedule counts."""
    return settings.num_steps * rollouts_per_step(settings) // settings.global_batch_size


def _layout(layout: RlhfLayout) -> dict[str, Any]:
    return {
        "trainer.num_nodes": layout.num_nodes,
        "trainer.devices": layout.gpus_per_node,
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.precision": "",  # set to trainer.precision in `render`, after overrides
    }


def _server(settings: Rlhf, facts: RlhfFacts, out: Path) -> dict[str, Any]:
    layout = settings.server_layout
    # One request holds the rollouts of one data-parallel rank of the actor.
    batch = max(1, settings.rollout_micro_batch_size // layout.dp)
    given = {str(name): weight for name, weight in settings.attribute_weights.items()}
    weights = [given.get(name, 0.0) for name in ATTRIBUTES]
    fill = {
        **_layout(layout),
        "model.forward_micro_batch_size": batch,
        "model.encoder_seq_length": settings.max_seq_len_tokens,
        "model.tokenizer.type": str(facts.reward_tokenizer),
        "model.regression.attribute_weights": weights if facts.reward == "regression" else None,
    }
    if settings.algorithm == "reinforce":
        return {
            **fill,
            "rm_model_file": str(facts.reward_nemo),
            "inference.port": settings.server_port,
            "inference.inference_micro_batch_size": batch,
        }
    steps = _optimizer_steps(settings)
    return {
        **fill,
        **_training(settings, layout, out / "critic", settings.critic_lr, settings.critic_min_lr),
        "pretrained_checkpoint.restore_from_path": str(facts.reward_nemo),
        "model.reward_model_type": "regression" if facts.reward == "regression" else "binary_ranking",
        "model.regression.num_attributes": len(ATTRIBUTES) if facts.reward == "regression" else 1,
        "trainer.ppo.port": settings.server_port,
        "trainer.ppo.inference_micro_batch_size": batch,
        "trainer.ppo.max_steps": steps,
        "trainer.max_steps": steps,
    }


def _training(settings: Rlhf, layout: RlhfLayout, log_dir: Path, lr: float, min_lr: float) -> dict[str, Any]:
    """Return the keys of a program that trains: the actor, and the server of PPO."""
    return {
        "exp_manager.explicit_log_dir": str(log_dir),
        "exp_manager.checkpoint_callback_params.model_parallel_size": layout.tp * layout.pp,
        "model.micro_batch_size": settings.micro_batch_size,
        "model.global_batch_size": settings.global_batch_size,
        "model.max_position_embeddings": settings.max_seq_len_tokens,
        "model.optim.lr": lr,
        "model.optim.sched.min_lr": min_lr,
        "model.optim.sched.warmup_steps": settings.warmup_steps,
    }


def _actor(settings: Rlhf, facts: RlhfFacts, out: Path) -> dict[str, Any]:
    key, layout = PROGRAMS[settings.algorithm].section, settings.actor_layout
    epochs = -(-settings.num_steps // steps_per_epoch(settings, facts))
    lengths = {"max_length": settings.max_new_tokens}
    trt = {
        "enable": settings.trt_llm,
        "reshard": settings.trt_llm and layout.pp > 1,
        "max_input_len": settings.max_seq_len_tokens - settings.max_new_tokens,
        "model_type": TRT_MODEL_TYPES[facts.actor_shape.activation],
    }
    rollouts = settings.rollout_micro_batch_size
    files = {part: [str(out / PROMPT_FILES[name])] for part, name in _PARTS.items()}
    fill = {
        **_layout(layout),
        **_training(settings, layout, out / "actor", settings.lr, settings.min_lr),
        "pretrained_checkpoint.restore_from_path": str(out / ACTOR_NEMO),
        "trainer.max_epochs": epochs,
        "trainer.max_steps": _optimizer_steps(settings),
        f"trainer.{key}.max_epochs": epochs,
        f"trainer.{key}.max_steps": settings.num_steps,
        f"trainer.{key}.val_check_interval": settings.valid_interval_steps,
        f"trainer.{key}.save_interval": settings.valid_interval_steps,
        f"trainer.{key}.initial_policy_kl_penalty": settings.kl_penalty,
        f"trainer.{key}.model_gbs": settings.global_batch_size,
        **{f"trainer.{key}.trt_llm.{name}": value for name, value in trt.items()},
        **{f"model.{key}.trt_llm.{name}": "" for name in (*trt, "seed", "unload_engine_train")},  # set in `render`
        "model.encoder_seq_length": settings.max_seq_len_tokens,
        f"model.{key}.rollout_micro_batch_size": rollouts,
        f"model.{key}.num_rollout_samples": settings.num_rollout_prompts,
        f"model.{key}.forward_micro_batch_size": rollouts,
        f"model.{key}.val_rollout_micro_batch_size": rollouts,
        f"model.{key}.num_val_samples": settings.num_valid_prompts,
        f"model.{key}.sampling_params.temperature": settings.temperature,
        f"model.{key}.sampling_params.end_strings": [facts.stop or END_OF_TEXT],
        **{f"model.{key}.length_params.{name}": value for name, value in lengths.items()},
        "model.data.seq_length": settings.max_seq_len_tokens,
        "model.data.data_prefix": files,
    }
    server = {"ip": settings.server_host, "port": settings.server_port}
    if settings.algorithm == "reinforce":
        own = {f"remote_rm.reward_model.{name}": value for name, value in server.items()}
        own |= {"trainer.reinforce.num_rollouts_per_prompt": settings.rollouts_per_prompt}
        return {**fill, **own, "remote_rm.pad_to_length": settings.max_seq_len_tokens}
    both = {f"remote_critic_rm.{who}.{name}": server[name] for who in ("critic", "reward_model") for name in server}
    return {**fill, **both, "remote_critic_rm.pad_to_length": settings.max_seq_len_tokens}


_PARTS = {"train": "train", "validation": "valid", "test": "valid"}


def _server_script(settings: Rlhf, programs: Programs, out: Path) -> str:
    layout = settings.server_layout
    launcher = [] if layout.num_nodes == 1 else _srun(layout)
    return _script(
        f"Server of {programs.actor}.yaml at port {settings.server_port}; runs until it is stopped.",
        [_program(programs.server_script, programs.server, out, launcher)],
        out,
    )


def _actor_script(settings: Rlhf, programs: Programs, out: Path) -> str:
    layout = settings.actor_layout
    mpi = ["mpirun", "-n", str(layout.gpus_per_node), "--allow-run-as-root"]
    # TensorRT-LLM needs MPI ranks. Without it, Lightning starts the processes of a node itself.
    launcher = _srun(layout) if layout.num_nodes > 1 else mpi if settings.trt_llm else []
    address = f"/dev/tcp/{settings.server_host}/{settings.server_port}"
    lines = [
        "export NCCL_ALGO=Tree  # two passes with the same weights give the same log-probabilities",
        f"until (exec 3<>{shlex.quote(address)}) 2>/dev/null; do",
        "  echo 'waiting for the server'",
        "  sleep 10",
        "done",
        _program(programs.actor_script, programs.actor, out, launcher),
    ]
    return _script("Training. Start it beside server.sh, here or on other nodes; it waits for the server.", lines, out)


def _back_script(programs: Programs, facts: RlhfFacts, out: Path) -> str:
    trained = out / "actor/checkpoints" / f"{programs.actor}.nemo"
    words = ["minitron", "convert", str(trained), str(out / "trained"), "--like", str(facts.actor_model)]
    return _script("Conversion of the trained model to a Hugging Face folder.", [f"exec {shlex.join(words)}"], out)


def _srun(layout: RlhfLayout) -> list[str]:
    return ["srun", f"--nodes={layout.num_nodes}", f"--ntasks-per-node={layout.gpus_per_node}"]


def _program(script: str, config: str, out: Path, launcher: list[str]) -> str:
    home = f'"${{{HOME_VARIABLE}}}/{GPT}/{script}"'
    options = [f"--config-path={out}", f"--config-name={config}"]
    return " ".join(["exec", *([shlex.join(launcher)] if launcher else []), "python -u", home, shlex.join(options)])


def _script(what: str, lines: list[str], out: Path) -> str:
    head = [
        "#!/bin/bash",
        f"# {what}",
        "set -euo pipefail",
        f'export {HOME_VARIABLE}="${{{HOME_VARIABLE}:-{HOME}}}" HYDRA_FULL_ERROR=1',
        f'export PYTHONPATH="${{{HOME_VARIABLE}}}:${{PYTHONPATH:-}}"',
        f"cd {shlex.quote(str(out))}",
    ]
    return "\n".join([*head, *lines]) + "\n"
