"""What REINFORCE and PPO share: datasets of prompts, curves, and the answers to held-out prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import save_nemo
from megatron.core.utils import divide
from nemo_aligner.data.nlp.builders import (
    build_dataloader,
    build_train_valid_test_rlhf_datasets,
    collate_with_pad_to_max_batch,
)
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.batch_iterators import get_batch_iterator_cls
from nemo_aligner.utils.distributed import all_reduce_dict
from nemo_aligner.utils.ppo_utils import create_mask
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import (
    load_from_nemo,
    retrieve_model_state_dict_in_cpu,
)
from omegaconf import DictConfig
from task import CURVES_FILE, PROGRESS_FILE, STOP_FILE, Task, is_main, rewrite_lines
from training import StopTimer, prepare

ANSWERS_FILE = "answers.jsonl"
"""Answers to the held-out prompts before the first step and at every validation."""
NAMES = {
    "train_rollouts/rewards": "reward",
    "train_rollouts/rewards_with_kl": "reward_with_penalty",
    "train_rollouts/kl": "kl_nats_per_token",
    "train_rollouts/log_prob": "log_prob_per_token",
    "train_rollouts/generation_length": "answer_tokens",
    "train_rollouts/fraction_of_samples_properly_ended": "ended",
    "train_optim/loss": "loss",
    "train_optim/grad_norm": "grad_norm",
    "train_optim/lr": "lr",
    "val_rollouts/rewards": "valid_reward",
    "val_rollouts/rewards_se": "valid_reward_se",
    "val_rollouts/kl": "valid_kl_nats_per_token",
    "val_rollouts/log_prob": "valid_log_prob_per_token",
    "val_rollouts/generation_length": "valid_answer_tokens",
    "val_rollouts/fraction_of_samples_properly_ended": "valid_ended",
}
"""Name of a trainer's metric -> name in the curves."""


@dataclass(frozen=True)
class Algorithm:
    """What differs between the algorithms."""

    key: str
    """Section below `trainer` and `model` of the config."""
    model_class: type[Any]
    make_trainer: Callable[..., Any]
    """Makes the trainer from the arguments that all of them take."""
    make_client: Callable[[DictConfig], Any]
    """Makes the client of the servers from the whole config."""
    client_argument: str


def train(task: Task, algorithm: Algorithm) -> dict[str, Any]:
    """Train a NeMo checkpoint to the end, or until STOP_FILE appears.

    Returns:
        `finished` and `step`. A finished training has written its checkpoint to `out` of the task.
    """
    config, trainer = prepare(task, algorithm.key)
    loggers = CustomLoggerWrapper(list(trainer.loggers))
    model = load_from_nemo(algorithm.model_class, config.model, trainer, strict=True, restore_path=task["nemo"])
    # The start of the training, also if it resumes: its log-probabilities measure the KL divergence.
    model.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
        model, megatron_amp_O2=config.model.get("megatron_amp_O2", False)
    )
    progress = None if trainer.ckpt_path is None else retrieve_custom_trainer_state_dict(trainer)
    init_distributed(trainer, model, config.model.get("transformer_engine", False))
    datasets = prompt_datasets(config, model)
    _init_optimizer(config, trainer, model, datasets[0])
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    first_step = int(progress["step"]) if progress else -1
    work = Path(task["work_dir"])
    loggers.loggers.append(RolloutCurves(work, config.trainer[algorithm.key].max_steps, first_step))
    stop = StopTimer(work / STOP_FILE)
    client = algorithm.make_client(config)
    rl_trainer = algorithm.make_trainer(
        cfg=config.trainer[algorithm.key],
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        **prompt_loaders(config, algorithm.key, model, datasets),
        **{algorithm.client_argument: client},
        batch_iterator_cls=get_batch_iterator_cls(config.trainer[algorithm.key].get("batch_iterator", {})),
        logger=loggers,
        ckpt_callback=add_custom_checkpoint_callback(trainer, model),
        run_timer=stop,
    )
    rl_trainer.answers = Answers(work / ANSWERS_FILE, first_step)
    if begin(rl_trainer, progress, loggers, stop):
        rl_trainer.fit()
    client.communicator.close()
    finished = rl_trainer.step >= rl_trainer.max_steps
    if finished:
        save_nemo(model, Path(task["out"]))
    return {"finished": finished, "step": int(rl_trainer.step)}


def prompt_datasets(config: DictConfig, model: Any) -> tuple[Any, Any]:
    """Return the datasets of the training prompts and of the held-out prompts."""
    data = config.model.data
    train_dataset, valid_dataset, _ = build_train_valid_test_rlhf_datasets(
        cfg=config.model,
        data_prefix=data.data_prefix,
        data_impl=data.data_impl,
        splits_string=data.splits_string,
        train_valid_test_num_samples=[-1, -1, -1],
        seq_length=data.seq_length,
        seed=config.model.seed,
        tokenizer=model.tokenizer,
    )
    return train_dataset, valid_dataset


def prompt_loaders(config: DictConfig, key: str, model: Any, datasets: tuple[Any, Any]) -> dict[str, Any]:
    """Return the trainer's arguments that build loaders of prompts."""
    settings = config.model[key]
    collate = collate_with_pad_to_max_batch(
        settings.length_params.max_length, model.tokenizer.eos_id, config, generate_masks_and_position_ids=False
    )
    build = partial(build_dataloader, cfg=config, collate_fn=collate, load_gbs=False)
    return {
        "train_dataloader_builder": partial(
            build, dataset=datasets[0], mbs=settings.rollout_micro_batch_size, gbs=settings.num_rollout_samples
        ),
        "val_dataloader_builder": partial(
            build,
            dataset=datasets[1],
            mbs=settings.val_rollout_micro_batch_size,
            gbs=settings.num_val_samples,
            use_random_sampler=False,
        ),
        "collate_fn": collate,
    }


def _init_optimizer(config: DictConfig, trainer: Any, model: Any, dataset: Any) -> None:
    """Set up the optimizer with a loader whose length NeMo takes for the number of steps, as NeMo-Aligner does."""
    batch_size = divide(config.model.global_batch_size, parallel_state.get_data_parallel_world_size())
    init_using_ptl(trainer, model, torch.utils.data.DataLoader(dataset=dataset, batch_size=batch_size), dataset)
    del model._train_dl


def begin(trainer: Any, progress: Mapping[str, Any] | None, loggers: CustomLoggerWrapper, stop: StopTimer) -> bool:
    """Load the progress of a resumed run, or measure the model before the first step; returns whether to train.

    A run that is stopped before its first step does not take it: it would resume after that, without the measurement.
    """
    if progress is not None:
        trainer.load_state_dict(progress)
        return True
    if stop.is_finished():
        return False
    metrics = trainer.run_validation()
    metrics.pop("table")
    trainer.timer.consume_durations()
    loggers.log_metrics(metrics, step=0, prefix="val_rollouts/")
    return True


def kl_nats(log_probs: torch.Tensor, start_log_probs: torch.Tensor, mask: torch.Tensor) -> float:
    """Return an unbiased, non-negative estimate of the KL divergence to the start per token.

    The tokens are sampled from the policy, so it is the mean of exp(d) - 1 - d with d = start - policy.
    """
    difference = (start_log_probs - log_probs).float()
    return float(((difference.exp() - 1 - difference) * mask).sum() / mask.sum().clamp(min=1))


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


def standard_error(values: torch.Tensor) -> dict[str, float]:
    """Return {"rewards_se": standard error of the mean}; without it for a single value."""
    if values.numel() < 2:
        return {}
    return {"rewards_se": float(values.float().std() / math.sqrt(values.numel()))}


class Answers:
    """File of answers to held-out prompts; lines of steps that a resumed run repeats are removed first."""

    def __init__(self, file: Path, first_step: int) -> None:
        self._file = file
        rewrite_lines(file, first_step)

    def write(self, step: int, batch: Mapping[str, torch.Tensor], tokenizer: Any) -> None:
        """Append the answers of one validation."""
        if not is_main():
            return
        with self._file.open("a", encoding="utf-8") as file:
            for index in range(len(batch["rewards"])):
                start, end = int(batch["prompt_lengths"][index]), int(batch["response_lengths"][index])
                tokens = batch["response_tokens"][index].tolist()
                row = {
                    "step": step,
                    "prompt": tokenizer.ids_to_text(tokens[:start]),
                    "answer": tokenizer.ids_to_text(tokens[start:end]),
                    "num_tokens": end - start,
                    "reward": float(batch["rewards"][index]),
                    "ended": bool(batch["is_end"][index]),
                }
                file.write(json.dumps(row) + "\n")


class RolloutCurves:
    """Logger that writes one JSON line for each step and for each validation, and the newest step to PROGRESS_FILE."""

    def __init__(self, work_dir: Path, max_steps: int, first_step: int) -> None:
        self._file, self._now = work_dir / CURVES_FILE, work_dir / PROGRESS_FILE
        self._max_steps = max_steps
        self._row: dict[str, float] = {}
        rewrite_lines(self._file, first_step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Collect the metrics of a step; the trainer logs timers last, and validations after it has counted the step.

        Of several optimizer steps, the last one counts.
        """
        row = {NAMES[name]: float(value) for name, value in metrics.items() if name in NAMES}
        if any(name.startswith("val_rollouts/") for name in metrics):
            self._write({"step": step or 0, **row})
            return
        self._row |= row
        if any(name.startswith("timers/") for name in metrics):
            self._write({"step": (step or 0) + 1, **self._row})
            self._row = {}

    def _write(self, row: Mapping[str, float]) -> None:
        if not is_main():
            return
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        seen = {"step": row["step"], "max_steps": self._max_steps}
        partial = self._now.with_suffix(".partial")
        partial.write_text(json.dumps({**seen, "loss": row["loss"]} if "loss" in row else seen))
        partial.replace(self._now)


class Measured:
    """Adds metrics to a trainer of NeMo-Aligner: KL divergence, log-probabilities, standard errors, and answers."""

    answers: Answers

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Also without a penalty: the KL divergence is reported, and NeMo-Aligner's REINFORCE would fail without it.
        self.compute_init_policy_kl = True

    def _run_inference(self: Any, dataloader_builder: Any, consumed_samples: int, is_validation: bool) -> Any:
        self._is_validation = is_validation
        batch, metrics = super()._run_inference(  # type: ignore[misc]
            dataloader_builder, consumed_samples, is_validation
        )
        if is_validation:
            batch["init_logprobs"] = self.model.get_init_policy_logprobs(batch["response_tokens"])
        return batch, {**metrics, **_policy_metrics(batch)}

    def compute_rollout_metrics(self: Any, rollout_batch: Any) -> Any:
        """Return the trainer's metrics of all ranks' answers; write the answers of a validation.

        Raises:
            RuntimeError: a reward is not finite.
        """
        if not torch.isfinite(rollout_batch["rewards"]).all():
            raise RuntimeError("the server gave a reward that is not a finite number; its log says why")
        metrics = super().compute_rollout_metrics(rollout_batch)  # type: ignore[misc]
        if self._is_validation:
            metrics |= standard_error(rollout_batch["rewards"])
            self.answers.write(self.step, rollout_batch, self.model.tokenizer)
        return metrics
