"""Code that all trainings with NeMo-Aligner's public classes share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from checkpoints import save_nemo
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.data.nlp.builders import build_dataloader
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
    resolve_and_create_trainer,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo
from omegaconf import DictConfig, OmegaConf, open_dict
from task import STOP_FILE, Curves, Task

Loaders = tuple[Any, Any, Any]
"""(training dataset, training loader, validation loader)."""


class StopTimer(Timer):  # type: ignore[misc]
    """Timer that also ends a training when a file appears. NeMo-Aligner checks its timer after every step."""

    def __init__(self, stop_file: Path) -> None:
        super().__init__(None)
        self._stop_file = stop_file

    def is_finished(self) -> bool:
        """Return whether the file exists, as seen by rank 0, on every rank."""
        seen = torch.tensor([self._stop_file.exists()], dtype=torch.bool, device=torch.cuda.current_device())
        torch.distributed.broadcast(seen, 0)
        return bool(seen.item())


def train(
    task: Task,
    key: str,
    model_class: type[Any],
    make_loaders: Callable[[DictConfig, Any, int], Loaders],
    make_trainer: Callable[..., Any],
    *,
    after_load: Callable[[Any, DictConfig], None] = lambda model, config: None,
    base_model_only: bool = False,
) -> dict[str, Any]:
    """Train a NeMo checkpoint to the end, or until STOP_FILE appears.

    Args:
        key: section below `trainer` of the config with the settings of this trainer.
        make_loaders: (config, model, samples consumed before) -> loaders.
        make_trainer: makes the trainer from the arguments that all trainers take.
        after_load: called before the weights of a resumed run replace those of the checkpoint.
        base_model_only: whether the checkpoint has no reward head.

    Returns:
        `finished`, `step` and `seconds`. A finished training has written its checkpoint to `out` of the task.
    """
    started_s = time.monotonic()
    config, trainer = prepare(task, key)
    loggers = CustomLoggerWrapper(list(trainer.loggers))
    model = load_from_nemo(
        model_class,
        config.model,
        trainer,
        strict=True,
        load_base_model_only=base_model_only,
        restore_path=task["nemo"],
    )
    after_load(model, config)
    progress = None if trainer.ckpt_path is None else retrieve_custom_trainer_state_dict(trainer)
    init_distributed(trainer, model, config.model.get("transformer_engine", False))
    dataset, loader, valid_loader = make_loaders(config, model, progress["consumed_samples"] if progress else 0)
    init_using_ptl(trainer, model, loader, dataset)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    settings, work = config.trainer[key], Path(task["work_dir"])
    loggers.loggers.append(Curves(work, settings.max_steps, int(progress["step"]) if progress else -1))
    aligner = make_trainer(
        cfg=settings,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loader,
        val_dataloader=valid_loader,
        test_dataloader=None,
        logger=loggers,
        ckpt_callback=add_custom_checkpoint_callback(trainer, model),
        run_timer=StopTimer(work / STOP_FILE),
    )
    add_standard_errors(aligner)
    begin(aligner, progress, loggers)
    aligner.fit()
    finished = aligner.step >= aligner.max_steps
    if finished:
        save_nemo(model, Path(task["out"]))
    return {"finished": finished, "step": int(aligner.step), "seconds": time.monotonic() - started_s}


def add_standard_errors(trainer: Any) -> None:
    """Add `loss_se` to the metrics of the trainer's validations: the standard error of the loss over the batches."""
    step, run, losses = trainer.validation_step, trainer.run_validation, []

    def validation_step(batch: Any) -> tuple[Any, Any]:
        loss, metrics = step(batch)
        losses.append(float(loss))
        return loss, metrics

    def run_validation() -> tuple[Any, Any]:
        losses.clear()
        loss, metrics = run()
        if len(losses) > 1:
            metrics["loss_se"] = stdev(losses) / math.sqrt(len(losses))
        return loss, metrics

    trainer.validation_step, trainer.run_validation = validation_step, run_validation


def begin(trainer: Any, progress: dict[str, Any] | None, loggers: CustomLoggerWrapper) -> None:
    """Load the progress of a resumed run, or log the held-out loss before the first step as that of step 0.

    The validation changes nothing that follows.

    Raises:
        RuntimeError: a validation would have no batch.
    """
    if trainer.limit_val_batches == 0:
        raise RuntimeError("limit_val_batches leaves none of the held-out batches; raise it, or set a number of them")
    if progress is not None:
        trainer.load_state_dict(progress)
        return
    random_numbers = torch.get_rng_state()  # a loader draws one when it starts
    _, metrics = trainer.run_validation()
    torch.set_rng_state(random_numbers)
    loggers.log_metrics(metrics, step=0, prefix="val/")


def jsonl_arguments(config: DictConfig, model: Any) -> dict[str, Any]:
    """Return the arguments of NeMo-Aligner's functions that build datasets from .jsonl files."""
    data = config.model.data
    return {
        "cfg": config.model,
        "data_prefix": data.data_prefix,
        "data_impl": data.data_impl,
        "splits_string": None,
        "train_valid_test_num_samples": [-config.model.global_batch_size] * 3,
        "seq_length": data.seq_length,
        "seed": config.model.seed,
        "tokenizer": model.tokenizer,
    }


def batch_loaders(
    config: DictConfig, train_dataset: Any, valid_dataset: Any, consumed_samples: int, collate_fn: Callable[..., Any]
) -> Loaders:
    """Return the loaders of datasets that share one batch size; training rows come in random order."""
    loaders = [
        build_dataloader(
            cfg=config,
            dataset=dataset,
            consumed_samples=consumed,
            mbs=config.model.micro_batch_size,
            gbs=config.model.global_batch_size,
            load_gbs=True,
            pad_samples_to_global_batch_size=False,
            collate_fn=collate_fn,
            use_random_sampler=is_training,
        )
        for dataset, consumed, is_training in ((train_dataset, consumed_samples, True), (valid_dataset, 0, False))
    ]
    return train_dataset, loaders[0], loaders[1]


def sft_loaders(config: DictConfig, consumed_samples: int, make_dataset: Callable[[DictConfig], Any]) -> Loaders:
    """Return the loaders for the config sections `train_ds` and `validation_ds`, which have their own batch sizes."""
    parts = []
    for data, consumed, is_training in (
        (config.model.data.train_ds, consumed_samples, True),
        (config.model.data.validation_ds, 0, False),
    ):
        dataset = make_dataset(data)
        loader = build_dataloader(
            cfg=config,
            dataset=dataset,
            consumed_samples=consumed,
            mbs=data.micro_batch_size,
            gbs=data.global_batch_size,
            collate_fn=dataset.collate_fn,
            drop_last=data.drop_last,
            pad_samples_to_global_batch_size=not data.drop_last,
            load_gbs=True,
            use_random_sampler=is_training,
        )
        parts.append((dataset, loader))
    return parts[0][0], parts[0][1], parts[1][1]


def prepare(task: Task, key: str) -> tuple[DictConfig, Any]:
    """Return (complete config, Lightning trainer)."""
    config = OmegaConf.create(dict(task["config"]))
    config.model = load_and_override_model_config(task["nemo"], config.model)
    with open_dict(config):
        # A copy instead of an interpolation, because it must also be in checkpoints.
        config.model.precision = config.trainer.precision
    trainer = resolve_and_create_trainer(config, key)
    exp_manager(trainer, config.exp_manager)
    return config, trainer
