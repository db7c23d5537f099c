"""Stages that NeMo-Aligner trains: fine-tuning, preferences, reward models. Hugging Face in, Hugging Face out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.config import TRAINER_KEYS, Method, complete_config
from nemo_minitron.backends.alignment.nemo_aligner.environment import require_gpu_kernels
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.hf.checkpoint import model_facts
from nemo_minitron.processes.nodes import Nodes
from nemo_minitron.schema.alignment import Alignment
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.align.params import AttributeModelStage, DpoStage, SftStage, SteerlmSftStage
from nemo_minitron.stages.align.rows import Rows, write_rows
from nemo_minitron.stages.annotate.run import agreement, predict, read_labels
from nemo_minitron.stages.artifacts import ChatRows, Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.system.files import write_whole

CURVES_FILE = "curves.jsonl"
NEMO_DIR = "nemo"
"""The NeMo checkpoint inside a published attribute model."""


@dataclass(frozen=True)
class Inputs:
    """What the stages read."""

    model: Model
    chats: ChatRows


@dataclass(frozen=True)
class Job:
    """One training by NeMo-Aligner."""

    method: Method
    params: Alignment
    model_dir: Path
    rows: Rows
    fill: dict[str, Any]
    """Keys of this method alone."""


def sft(params: SftStage | SteerlmSftStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Fine-tune on conversations; publishes a Hugging Face model and the curves.

    Raises:
        DataError: rows that cannot be used.
        ConfigError: a NeMo-Aligner key or model that it does not know, or sizes that do not fit.
        Interrupted: asked to stop; the same command goes on.
    """
    rows = write_rows(params, inputs.model, inputs.chats, ctx)
    paths = {
        f"model.data.{part}.{key}": value
        for part, file in (("train_ds", rows.train), ("validation_ds", rows.valid))
        for key, value in {
            "file_path": str(file),
            "global_batch_size": params.global_batch_size,
            "micro_batch_size": parallel(ctx).micro_batch_size,
            "max_seq_length": params.max_seq_len_tokens,
        }.items()
    }
    job = Job("sft", params, inputs.model.path, rows, {**paths, "model.restore_from_path": ""})
    return train_and_publish(job, ctx)


def dpo(params: DpoStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Optimise preferences against the input model; publishes a Hugging Face model and the curves.

    Raises:
        As `sft`.
    """
    rows = write_rows(params, inputs.model, inputs.chats, ctx)
    fill = {
        "model.dpo.preference_loss": params.preference_loss,
        "model.dpo.ref_policy_kl_penalty": params.beta,
        "model.dpo.gt_reward_scale": params.reward_scale,
        "model.dpo.sft_loss_weight": params.sft_loss_weight,
        "model.dpo.preference_average_log_probs": params.average_log_probs,
        "model.dpo.sft_average_log_probs": params.average_log_probs,
        "model.dpo.log_prob_forward_micro_batch_size": parallel(ctx).micro_batch_size,
        **_json_rows(rows, params),
    }
    return train_and_publish(Job("dpo", params, inputs.model.path, rows, fill), ctx)


def train_attribute_model(params: AttributeModelStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Train a reward model; publishes its NeMo checkpoint, which `annotate` reads.

    Raises:
        As `sft`.
    """
    rows = write_rows(params, inputs.model, inputs.chats, ctx)
    regression = params.reward == "regression"
    fill = {
        "model.reward_model_type": "regression" if regression else "binary_ranking",
        "model.regression.num_attributes": len(ATTRIBUTES) if regression else 1,
        "model.share_embeddings_and_output_weights": False,  # it has no output layer
        "model.forward_micro_batch_size": parallel(ctx).micro_batch_size,
        **_json_rows(rows, params),
    }
    job = Job("reward_model", params, inputs.model.path, rows, fill)
    _train(job, ctx, ctx.out_dir / NEMO_DIR)
    shutil.copytree(_nemo(ctx).with_name(f"{NEMO_DIR}.tokenizer"), ctx.out_dir / f"{NEMO_DIR}.tokenizer")
    facts = {
        **_facts(job, ctx),
        "reward": params.reward,
        "template": params.template,
        "whole_markers": params.whole_markers,
        "template_date": params.template_date.isoformat(),
    }
    return {**facts, "agreement": _agreement(rows, ctx)} if regression else facts


def _agreement(rows: Rows, ctx: StageContext) -> dict[str, Any]:
    """With people, on the held-out rows."""
    texts, labels = zip(*read_labels(rows.valid), strict=True)
    found = predict(ctx.out_dir / NEMO_DIR, texts, parallel(ctx).micro_batch_size, ctx)
    return agreement(labels, found, (label for _, label in read_labels(rows.train)))


def _json_rows(rows: Rows, params: Alignment) -> dict[str, Any]:
    files = {"train": [str(rows.train)], "validation": [str(rows.valid)], "test": [str(rows.valid)]}
    return {
        "model.data.data_prefix": files,
        "model.data.seq_length": params.max_seq_len_tokens,
        "pretrained_checkpoint.restore_from_path": "",
    }


def train_and_publish(job: Job, ctx: StageContext) -> Result:
    """Train, and publish a Hugging Face model with its template and curves."""
    from nemo_minitron.data.chat.templates import set_template

    trained = ctx.work_dir / "trained"
    config = _train(job, ctx, trained)
    convert.from_nemo(
        trained,
        config,
        job.model_dir,
        ctx.out_dir,
        ctx.work_dir / "border",
        log_file(ctx),
        ctx.progress,
        ctx.stop,
        on_cpu=on_cpu(ctx),
    )
    set_template(ctx.out_dir, job.params.template)
    return {**model_facts(ctx.out_dir), **_facts(job, ctx)}


def _train(job: Job, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Train into the NeMo checkpoint `out`; returns the model config of the start."""
    cpu = on_cpu(ctx)
    layout, nemo = parallel(ctx), _nemo(ctx)
    settings = ctx.work_dir / "model_config.json"
    if not (nemo.is_dir() and settings.is_file()):
        ctx.progress.say("the model goes to NeMo's format")
        config = convert.to_nemo(
            job.model_dir,
            nemo,
            ctx.work_dir / "border",
            log_file(ctx),
            ctx.progress,
            ctx.stop,
            seq_len_tokens=job.params.max_seq_len_tokens,
            on_cpu=cpu,
            tp=layout.tp,
        )
        write_whole(settings, json.dumps(config))
    config = json.loads(settings.read_text())
    where = f"stages.{ctx.name}"
    fill = {**_common(job, layout, ctx.work_dir), **job.fill}
    for key in ("model.restore_from_path", "pretrained_checkpoint.restore_from_path"):
        if key in fill:
            fill[key] = str(nemo)
    complete = complete_config(job.method, fill, job.params.aligner, on_cpu=cpu, where=where)
    (ctx.work_dir / "aligner_config.json").write_text(json.dumps(complete, indent=2))
    task = {"config": complete, "nemo": str(nemo), "out": str(out), "base_model_only": job.method == "reward_model"}
    run_task(
        job.method,
        task,
        ctx.work_dir / "training",
        log_file(ctx),
        ctx.progress,
        ctx.stop,
        num_processes=layout.world_size,
        threads=ctx.execution.threads,
        stage_work=ctx.work_dir,
        on_cpu=cpu,
    )
    shutil.copyfile(ctx.work_dir / "training" / CURVES_FILE, ctx.out_dir / CURVES_FILE)
    shutil.copyfile(ctx.work_dir / "aligner_config.json", ctx.out_dir / "aligner_config.json")
    return config


def _common(job: Job, layout: Parallel, work_dir: Path) -> dict[str, Any]:
    """Keys that every method has."""
    params, key = job.params, TRAINER_KEYS[job.method]
    steps_per_epoch = job.rows.num_train // params.global_batch_size
    num_steps = params.num_steps or params.num_epochs * steps_per_epoch
    num_epochs = -(-num_steps // steps_per_epoch)
    interval = min(params.valid_interval_steps, num_steps)
    return {
        **trainer_keys(layout),
        "trainer.max_epochs": num_epochs,
        "trainer.max_steps": num_steps,
        f"trainer.{key}.max_epochs": num_epochs,
        f"trainer.{key}.max_steps": num_steps,
        f"trainer.{key}.val_check_interval": interval,
        f"trainer.{key}.save_interval": interval,
        "exp_manager.explicit_log_dir": str(work_dir / "training" / "nemo_experiment"),
        "exp_manager.checkpoint_callback_params.model_parallel_size": layout.tp * layout.pp,
        "model.seed": params.seed,
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.sequence_parallel": layout.sequence_parallel,
        "model.encoder_seq_length": params.max_seq_len_tokens,
        "model.micro_batch_size": layout.micro_batch_size,
        "model.global_batch_size": params.global_batch_size,
        "model.optim.lr": params.lr,
        "model.optim.sched.warmup_steps": params.warmup_steps,
        "model.optim.sched.min_lr": params.min_lr,
    }


def trainer_keys(layout: Parallel) -> dict[str, Any]:
    """Processes and nodes of a layout."""
    nodes = Nodes.here().count if layout.world_size > 1 else 1
    return {"trainer.num_nodes": nodes, "trainer.devices": layout.world_size // nodes}


def _facts(job: Job, ctx: StageContext) -> dict[str, Any]:
    rows = [json.loads(line) for line in (ctx.out_dir / CURVES_FILE).read_text().splitlines()]
    train = [row["train/loss"] for row in rows if "train/loss" in row]
    valid = [row["val/loss"] for row in rows if "val/loss" in row]
    return {
        "method": job.method,
        "num_steps": rows[-1]["step"],
        "first_loss": train[0],
        "last_loss": train[-1],
        "first_valid_loss": valid[0] if valid else None,
        "valid_loss": valid[-1] if valid else None,
        "lengths": job.rows.facts,
    }


def parallel(ctx: StageContext) -> Parallel:
    """The stage's layout."""
    return ctx.execution.parallel_by_stage.get(ctx.name, ctx.execution.parallel)


def _nemo(ctx: StageContext) -> Path:
    return ctx.work_dir / NEMO_DIR


def log_file(ctx: StageContext) -> Path:
    """What NeMo-Aligner's processes print."""
    return ctx.work_dir / "aligner.log"


def on_cpu(ctx: StageContext) -> bool:
    """Whether the stage uses no GPU.

    Raises:
        EnvironmentProblem: there is a GPU, and NeMo-Aligner's environment is not made for one.
    """
    import torch

    if ctx.execution.device == "cpu" or not torch.cuda.is_available():
        return True
    require_gpu_kernels()
    return False
