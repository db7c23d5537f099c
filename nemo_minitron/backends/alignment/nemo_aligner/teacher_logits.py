"""Cache of a teacher's top logits, in the files that NeMo-Aligner's distillation reads."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import TaskContext, TeacherObjective, Training
from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.config import complete_config
from nemo_minitron.backends.alignment.nemo_aligner.context import conversion_dir, log_file, on_cpu, trainer_keys
from nemo_minitron.backends.alignment.nemo_aligner.fork_server import ForkServer
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task

CHUNK_ID = "CHUNK_ID"
"""Placeholder of NeMo-Aligner for the number of a file, in the pattern that names the files of a part."""
MAX_ROWS_PER_FILE = 8
"""Bounds the work of reading a row: NeMo-Aligner reads its file from the beginning."""


@dataclass(frozen=True)
class CachedLogits:
    """Patterns of the files of both parts, with CHUNK_ID in their names."""

    train: Path
    valid: Path
    rows_per_file: int

    @staticmethod
    def num_files(pattern: Path) -> int:
        """Return how many files of a part there are."""
        return len(list(pattern.parent.glob(pattern.name.replace(CHUNK_ID, "*"))))


def cache_logits(
    training: Training, objective: TeacherObjective, context: TaskContext, server: ForkServer | None
) -> CachedLogits:
    """Run the teacher on all rows and keep its top logits; resumes after a part that a stopped run has finished."""
    folder = context.work_dir / "teacher_logits"
    # NeMo-Aligner writes whole files only. Their size divides a batch, so that no batch is lost.
    rows_per_file = math.gcd(training.global_batch_size, MAX_ROWS_PER_FILE)
    logits = CachedLogits(folder / f"train_{CHUNK_ID}.jsonl", folder / f"valid_{CHUNK_ID}.jsonl", rows_per_file)
    finished = folder / "finished"
    if finished.is_file():
        return logits
    nemo = context.work_dir / "teacher" / "nemo"
    if not nemo.is_dir():
        context.progress.say("converting the teacher to NeMo's format")
        _convert_teacher(training, objective.teacher_dir, nemo, context, server)
    for part, rows, pattern in (
        ("train", training.train_rows, logits.train),
        ("valid", training.valid_rows, logits.valid),
    ):
        keys = _keys(training, objective, nemo, rows, pattern, context)
        _cache_part(part, keys, nemo, rows_per_file, context, server)
    finished.touch()
    shutil.rmtree(nemo.parent)
    return logits


def _convert_teacher(
    training: Training, teacher_dir: Path, nemo: Path, context: TaskContext, server: ForkServer | None
) -> None:
    nemo.parent.mkdir(parents=True, exist_ok=True)
    convert.to_nemo(
        teacher_dir,
        nemo,
        conversion_dir(context),
        log_file(context),
        context.progress,
        context.stop,
        seq_len_tokens=training.max_seq_len_tokens,
        on_cpu=on_cpu(context),
        tp=context.layout.tp,
        server=server,
    )


def _cache_part(
    part: str, keys: dict[str, Any], nemo: Path, rows_per_file: int, context: TaskContext, server: ForkServer | None
) -> None:
    cpu = on_cpu(context)
    config = complete_config("topk_logits", keys, {}, on_cpu=cpu, where=f"stages.{context.stage}")
    run_task(
        "topk_logits",
        {"config": config, "nemo": str(nemo), "rows_per_file": rows_per_file},
        context.work_dir / f"logits_{part}",
        log_file(context),
        context.progress,
        context.stop,
        num_processes=context.layout.world_size,
        threads=context.threads,
        stage_work=context.work_dir,
        on_cpu=cpu,
        server=server,
    )


def _keys(
    training: Training, objective: TeacherObjective, nemo: Path, rows: Path, pattern: Path, context: TaskContext
) -> dict[str, Any]:
    layout = context.layout
    return {
        "output_path": str(pattern),
        "top_k": objective.top_k,
        **trainer_keys(layout),
        "pretrained_checkpoint.restore_from_path": str(nemo),
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.micro_batch_size": layout.micro_batch_size,
        "model.global_batch_size": training.global_batch_size,
        "model.encoder_seq_length": training.max_seq_len_tokens,
        "data.data.file_path": str(rows),
        "data.data.max_seq_length": training.max_seq_len_tokens,
    }
