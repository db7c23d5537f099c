"""Trainings by NeMo-Aligner: convert the model, complete the config, train, convert back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import CURVES_FILE, TaskContext, Training
from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.config import TRAINER_KEYS, complete_config
from nemo_minitron.backends.alignment.nemo_aligner.context import (
    conversion_dir,
    log_file,
    on_cpu,
    task_server,
    trainer_keys,
)
from nemo_minitron.backends.alignment.nemo_aligner.fork_server import ForkServer
from nemo_minitron.backends.alignment.nemo_aligner.last_checkpoint import EXPERIMENT_DIR, keep_last_checkpoint
from nemo_minitron.backends.alignment.nemo_aligner.model_config import tokenizer_dir
from nemo_minitron.backends.alignment.nemo_aligner.objectives import objective_keys
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.errors import ConfigError
from nemo_minitron.system.files import write_whole

CONFIG_FILE = "aligner_config.json"
"""File with the complete config of a training, in the work folder and beside the curves."""


def train_language_model(training: Training, out_dir: Path, context: TaskContext) -> Path:
    """Train, and write a Hugging Face model with its curves to `out_dir`; returns the file of the curves."""
    trained, cpu = context.work_dir / "trained", on_cpu(context)
    with task_server(training.objective.method, context, on_cpu=cpu) as server:
        model_config = _train(training, trained, context, server)
        curves = _publish_records(out_dir, context)
        convert_back(trained, model_config, training.model_dir, out_dir, context, server, on_cpu=cpu)
    return curves


def train_reward_model(training: Training, nemo: Path, context: TaskContext) -> Path:
    """Train into the NeMo checkpoint `nemo`, tokenizer and curves beside it; returns the file of the curves."""
    with task_server(training.objective.method, context, on_cpu=on_cpu(context)) as server:
        _train(training, nemo, context, server)
    curves = _publish_records(nemo.parent, context)
    shutil.copytree(tokenizer_dir(start_checkpoint(context)), tokenizer_dir(nemo))
    return curves


def _publish_records(out_dir: Path, context: TaskContext) -> Path:
    """Copy the curves and the complete config; returns the file of the curves."""
    shutil.copyfile(context.work_dir / "training" / CURVES_FILE, out_dir / CURVES_FILE)
    shutil.copyfile(context.work_dir / CONFIG_FILE, out_dir / CONFIG_FILE)
    return out_dir / CURVES_FILE


def _train(training: Training, out: Path, context: TaskContext, server: ForkServer | None) -> dict[str, Any]:
    """Train into the NeMo checkpoint `out`; returns the model config of the checkpoint that it started from."""
    cpu, method = on_cpu(context), training.objective.method
    nemo = start_checkpoint(context)
    # A teacher's logits are cached before the student is converted.
    own_keys = objective_keys(training, nemo, context, server)
    model_config = converted(training.model_dir, training.max_seq_len_tokens, nemo, context, server, on_cpu=cpu)
    complete = complete_config(
        method,
        {**_common_keys(training, context), **own_keys},
        training.overrides,
        on_cpu=cpu,
        where=f"stages.{context.stage}",
    )
    (context.work_dir / CONFIG_FILE).write_text(json.dumps(complete, indent=2))
    keep_last_checkpoint(context.work_dir / "training")
    run_task(
        method,
        {"config": complete, "nemo": str(nemo), "out": str(out), "base_model_only": method == "reward_model"},
        context.work_dir / "training",
        log_file(context),
        context.progress,
        context.stop,
        num_processes=context.layout.world_size,
        threads=context.threads,
        stage_work=context.work_dir,
        on_cpu=cpu,
        server=server,
    )
    return model_config


def start_checkpoint(context: TaskContext) -> Path:
    """Return the NeMo checkpoint that the training starts from."""
    return context.work_dir / "nemo"


def converted(
    model_dir: Path,
    seq_len_tokens: int,
    nemo: Path,
    context: TaskContext,
    server: ForkServer | None,
    *,
    on_cpu: bool,
) -> dict[str, Any]:
    """Convert the input model to `nemo` unless an earlier run has done it; returns the model config.

    Raises:
        ConfigError: a training that began with another tp cannot resume with this one.
    """
    settings = context.work_dir / "model_config.json"
    if nemo.is_dir() and settings.is_file():
        found: dict[str, Any] = json.loads(settings.read_text())
        if found["override_vocab_size"] % context.layout.tp == 0:
            return found
        _require_no_step(found["override_vocab_size"], context)
        settings.unlink()  # it must not describe the new checkpoint if this is killed
    context.progress.say("converting the model to NeMo's format")
    config = convert.to_nemo(
        model_dir,
        nemo,
        conversion_dir(context),
        log_file(context),
        context.progress,
        context.stop,
        seq_len_tokens=seq_len_tokens,
        on_cpu=on_cpu,
        tp=context.layout.tp,
        server=server,
    )
    write_whole(settings, json.dumps(config))
    return config


def _require_no_step(num_rows: int, context: TaskContext) -> None:
    step, tp = keep_last_checkpoint(context.work_dir / "training"), context.layout.tp
    if step:
        raise ConfigError(
            f"The training cannot resume from its checkpoint of step {step} with tp = {tp}: the vocabulary there is "
            f"padded to {num_rows} rows, the multiple of the tp with which it began.",
            where=f"execution.parallel.tp of stages.{context.stage}",
            allowed=f"a divisor of {num_rows}",
            next_step=f"Set tp as it was, or start the training again: --rerun {context.stage}.",
        )


def convert_back(
    trained: Path,
    model_config: dict[str, Any],
    model_dir: Path,
    out_dir: Path,
    context: TaskContext,
    server: ForkServer | None,
    *,
    on_cpu: bool,
) -> None:
    """Convert the trained NeMo checkpoint to a Hugging Face folder like that of the input model."""
    convert.from_nemo(
        trained,
        model_config,
        model_dir,
        out_dir,
        conversion_dir(context),
        log_file(context),
        context.progress,
        context.stop,
        on_cpu=on_cpu,
        server=server,
    )


def _common_keys(training: Training, context: TaskContext) -> dict[str, Any]:
    """Return the config keys that every method has."""
    key, layout = TRAINER_KEYS[training.objective.method], context.layout
    steps_per_epoch = training.num_train_rows // training.global_batch_size
    num_steps = training.num_steps
    num_epochs = -(-num_steps // steps_per_epoch)
    interval = min(training.valid_interval_steps, num_steps)
    return {
        **trainer_keys(layout),
        "trainer.max_epochs": num_epochs,
        "trainer.max_steps": num_steps,
        f"trainer.{key}.max_epochs": num_epochs,
        f"trainer.{key}.max_steps": num_steps,
        f"trainer.{key}.val_check_interval": interval,
        f"trainer.{key}.save_interval": interval,
        "exp_manager.explicit_log_dir": str(context.work_dir / "training" / EXPERIMENT_DIR),
        "exp_manager.checkpoint_callback_params.model_parallel_size": layout.tp * layout.pp,
        "model.seed": training.seed,
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.sequence_parallel": layout.sequence_parallel,
        "model.encoder_seq_length": training.max_seq_len_tokens,
        "model.micro_batch_size": layout.micro_batch_size,
        "model.global_batch_size": training.global_batch_size,
        "model.optim.lr": training.lr,
        "model.optim.sched.warmup_steps": training.warmup_steps,
        "model.optim.sched.min_lr": training.min_lr,
    }
