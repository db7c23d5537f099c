"""Offline distillation by NeMo-Aligner: a teacher's top logits are cached, then a student learns them."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.config import complete_config
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.stages.align import run as align
from nemo_minitron.stages.align.rows import Rows, write_rows
from nemo_minitron.stages.artifacts import ChatRows, Model
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.distill_offline.params import DistillOfflineStage
from nemo_minitron.stages.kind import Result

CHUNK_ID = "CHUNK_ID"
"""In a name of files; NeMo-Aligner's sign for their number."""
MAX_ROWS_PER_FILE = 8
"""To read one row, NeMo-Aligner reads its file from the beginning."""


@dataclass(frozen=True)
class Inputs:
    """What the stage reads."""

    model: Model
    teacher: Model
    chats: ChatRows


def distill_offline(params: DistillOfflineStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Distil on conversations; publishes a Hugging Face model and the curves.

    Raises:
        DataError: rows that cannot be used, or two tokenizers.
        As `align.sft`.
    """
    rows = write_rows(params, inputs.model, inputs.chats, ctx)
    models = {"model": inputs.model, "teacher": inputs.teacher}
    require_one_tokenizer(models, None, ctx, texts=(rows.train, rows.valid))
    # Whole files only; their size divides a batch, so that no batch is lost.
    per_file = math.gcd(params.global_batch_size, MAX_ROWS_PER_FILE)
    names = _cache(params, inputs.teacher.path, rows, per_file, ctx)
    parts = {"train": names["train"], "validation": names["valid"], "test": names["valid"]}
    fill = {
        "model.knowledge_distillation.kd_loss": params.kd_loss,
        "model.knowledge_distillation.kd_loss_weight": params.kd_loss_weight,
        "model.knowledge_distillation.sft_loss_weight": params.sft_loss_weight,
        "model.data.top_k": params.top_k,
        "model.data.n_examples_per_chunk": per_file,
        "model.data.n_chunks": {part: _num_files(name) for part, name in parts.items()},
        "model.data.data_prefix": {part: [str(name)] for part, name in parts.items()},
        "model.data.seq_length": params.max_seq_len_tokens,
        "pretrained_checkpoint.restore_from_path": "",
    }
    job = align.Job("knowledge_distillation", params, inputs.model.path, rows, fill)
    return align.train_and_publish(job, ctx)


def _cache(params: DistillOfflineStage, teacher: Path, rows: Rows, per_file: int, ctx: StageContext) -> dict[str, Path]:
    """Part -> the name of its files. What a stopped run has cached stays."""
    folder = ctx.work_dir / "teacher_logits"
    names = {part: folder / f"{part}_{CHUNK_ID}.jsonl" for part in ("train", "valid")}
    finished = folder / "finished"
    if finished.is_file():
        return names
    nemo = ctx.work_dir / "teacher" / align.NEMO_DIR
    if not nemo.is_dir():
        ctx.progress.say("the teacher goes to NeMo's format")
        _to_nemo(params, teacher, nemo, ctx)
    for part, file in (("train", rows.train), ("valid", rows.valid)):
        config = complete_config(
            "topk_logits",
            _fill(params, nemo, file, names[part], ctx),
            {},
            on_cpu=align.on_cpu(ctx),
            where=f"stages.{ctx.name}",
        )
        layout = align.parallel(ctx)
        run_task(
            "topk_logits",
            {"config": config, "nemo": str(nemo), "rows_per_file": per_file},
            ctx.work_dir / f"asking_{part}",
            align.log_file(ctx),
            ctx.progress,
            ctx.stop,
            num_processes=layout.world_size,
            threads=ctx.execution.threads,
            stage_work=ctx.work_dir,
            on_cpu=align.on_cpu(ctx),
        )
    finished.touch()
    shutil.rmtree(nemo.parent)
    return names


def _to_nemo(params: DistillOfflineStage, teacher: Path, nemo: Path, ctx: StageContext) -> None:
    nemo.parent.mkdir(parents=True, exist_ok=True)
    convert.to_nemo(
        teacher,
        nemo,
        ctx.work_dir / "border",
        align.log_file(ctx),
        ctx.progress,
        ctx.stop,
        seq_len_tokens=params.max_seq_len_tokens,
        on_cpu=align.on_cpu(ctx),
        tp=align.parallel(ctx).tp,
    )


def _fill(params: DistillOfflineStage, nemo: Path, rows: Path, out: Path, ctx: StageContext) -> dict[str, Any]:
    layout = align.parallel(ctx)
    return {
        "output_path": str(out),
        "top_k": params.top_k,
        **align.trainer_keys(layout),
        "pretrained_checkpoint.restore_from_path": str(nemo),
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.micro_batch_size": layout.micro_batch_size,
        "model.global_batch_size": params.global_batch_size,
        "model.encoder_seq_length": params.max_seq_len_tokens,
        "data.data.file_path": str(rows),
        "data.data.max_seq_length": params.max_seq_len_tokens,
    }


def _num_files(name: Path) -> int:
    return len(list(name.parent.glob(name.name.replace(CHUNK_ID, "*"))))
