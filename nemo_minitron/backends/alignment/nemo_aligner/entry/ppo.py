"""PPO (1707.06347): the actor, and the server of the critic, which is trained as well."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import without_tensorrt
from task import Task

with without_tensorrt.importable():
    from nemo_aligner.algorithms.ppo import PPORolloutBatch as PPORolloutBatch
    from nemo_aligner.algorithms.ppo import PPOTrainer
    from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel
import triton_socket
from nemo_aligner.models.nlp.gpt.megatron_gpt_critic import MegatronGPTCriticModel
from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMCriticClient
from nemo_aligner.utils.distributed import run_distributed_inference
from nemo_aligner.utils.text_generation_utils import tokenize_batch
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import load_from_nemo, set_autocast_gpu_dtype
from rollouts import Algorithm, Measured
from rollouts import train as train_with
from task import Curves
from training import prepare

KEPT = "checkpoint_before"
"""Folder beside the critic's checkpoints with the one before the newest."""


class Client(RemoteGPTRMCriticClient):  # type: ignore[misc]
    """NeMo-Aligner's client, which also reports that the critic could not be trained; NeMo-Aligner would go on."""

    _training: Any = None

    def train(self, ppo_rollout_data: Any) -> Any:
        """Request a training of the critic, and keep what will come of it on rank 0, which makes the request."""
        self._training = super().train(ppo_rollout_data)
        return self._training

    def require_trained(self) -> None:
        """Wait for the last training of the critic; all ranks must call this.

        Raises:
            RuntimeError: it failed.
        """
        errors: list[str | None] = [None]
        if self._training is not None:
            try:
                self._training.result()
            except Exception as error:
                errors = [f"{type(error).__name__}: {error}"]
            self._training = None
        torch.distributed.broadcast_object_list(errors, 0)
        if errors[0] is not None:
            raise RuntimeError(f"the critic could not be trained: {errors[0]}")


class Trainer(Measured, PPOTrainer):  # type: ignore[misc]
    """NeMo-Aligner's trainer with more metrics, which ends if its critic cannot be trained, and saves it first.

    So the critic's checkpoint is never older than the actor's; if a kill comes between, the critic goes back by one
    (`_choose_checkpoint`).
    """

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the critic, wait, and save the actor."""
        self.rm_critic.require_trained()
        save = self.rm_critic.save
        save().result()
        self.rm_critic.save = _Saved
        try:
            super().save(*args, **kwargs)
        finally:
            self.rm_critic.save = save

    def _run_inference(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._run_inference(*args, **kwargs)
        self.rm_critic.require_trained()  # not before, because the critic is trained while the actor is
        return found


class _Saved:
    """Placeholder for a save that has already finished."""

    def result(self) -> None:
        """Return at once."""


def train(task: Task) -> dict[str, Any]:
    """Train on the prompts {"text"} of the config with the rewards and the values of two servers."""
    triton_socket.prepare()
    algorithm = Algorithm(
        key="ppo",
        model_class=MegatronGPTActorModel,
        make_trainer=Trainer,
        make_client=lambda config: Client(config.remote_critic_rm),
        client_argument="rm_critic",
    )
    return train_with(task, algorithm)


def serve_critic(task: Task) -> dict[str, Any]:
    """Serve and train the critic until the process ends; it starts from a language model, with a new head."""
    triton_socket.prepare()
    triton_socket.announce(Path(task["work_dir"]) / task["ready_file"])
    from nemo_aligner.algorithms.critic_server_trainer import CriticServerTrainer

    _choose_checkpoint(_checkpoints(task), task["step"])
    config, trainer = prepare(task, "ppo")
    set_autocast_gpu_dtype(config.trainer.precision)
    model = load_from_nemo(
        MegatronGPTCriticModel,
        config.model,
        trainer,
        strict=True,
        restore_path=task["nemo"],
        load_base_model_only=task["base_model_only"],
    )
    progress = None if trainer.ckpt_path is None else retrieve_custom_trainer_state_dict(trainer)
    init_distributed(trainer, model, config.model.get("transformer_engine", False))
    init_using_ptl(trainer, model, None, None)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    loggers = CustomLoggerWrapper(list(trainer.loggers))
    first_step = int(progress["step"]) if progress else 0
    loggers.loggers.append(Curves(Path(task["work_dir"]), config.trainer.ppo.max_steps, first_step))

    class Server(CriticServerTrainer):  # type: ignore[misc]
        """Keeps the checkpoint before the newest, and serves values without rewards."""

        @torch.no_grad()
        def run_inference(self, inputs: Any = None) -> tuple[None, Any]:
            """Return (None, values): NeMo-Aligner's method expects rewards from the same model in any case."""
            self.model.prepare_for_inference()
            values = run_distributed_inference(inputs, self.infer_fn)
            self.model.finish_inference()
            torch.distributed.barrier()
            return None, values

        def save(self, *args: Any, **kwargs: Any) -> None:
            if torch.distributed.get_rank() == 0:
                _keep_newest(_checkpoints(task))
            super().save(*args, **kwargs)

    server = Server(
        cfg=config.trainer.ppo,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        logger=loggers,
        ckpt_callback=add_custom_checkpoint_callback(trainer, model),
        tokenize_func=lambda sentences: tokenize_batch(sentences, model.tokenizer, config.model.encoder_seq_length),
        gbs=config.model.global_batch_size,
        model_forward_micro_batch_size=config.model.forward_micro_batch_size,
    )
    if progress is not None:
        server.load_state_dict(progress)
    server.run_server()
    raise RuntimeError("Triton has ended")


def _checkpoints(task: Task) -> Path:
    return Path(task["config"]["exp_manager"]["explicit_log_dir"]) / "checkpoints"


def _keep_newest(checkpoints: Path) -> None:
    """Copy the newest checkpoint to KEPT, by links, because the next save removes it."""
    kept = checkpoints.with_name(KEPT)
    partial = checkpoints.with_name(f"{KEPT}.partial")
    for newest in checkpoints.glob("*-last"):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(newest, partial / newest.name, copy_function=os.link)
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)


def _choose_checkpoint(checkpoints: Path, step: int) -> None:
    """Leave the critic's checkpoint of this step to resume from; at step 0, none.

    Raises:
        RuntimeError: there is no checkpoint of this step.
    """
    found = {_step(path): path for path in checkpoints.glob("*-last")}
    if step in found:
        return
    kept = {_step(path): path for path in checkpoints.with_name(KEPT).glob("*-last")}
    if step and step not in kept:
        raise RuntimeError(
            f"the actor resumes with the critic of step {step}, and there are {sorted({**found, **kept})}"
        )
    shutil.rmtree(checkpoints, ignore_errors=True)
    if step:
        checkpoints.mkdir(parents=True)
        shutil.copytree(kept[step], checkpoints / kept[step].name, copy_function=os.link)


def _step(path: Path) -> int:
    match = re.search(r"step=(\d+)", path.name)
    return int(match.group(1)) if match else -1
