"""Predictions of a trained reward model, made in NeMo-Aligner's environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.backends.alignment.base import TaskContext
from nemo_minitron.backends.alignment.nemo_aligner.context import log_file
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task


def predict(
    nemo: Path, tokenizer: Path, texts: Sequence[str], batch_size: int, context: TaskContext
) -> list[list[float]]:
    """Return the reward model's outputs for each text, [texts][outputs].

    Args:
        nemo: the model's NeMo checkpoint.
        tokenizer: its Hugging Face tokenizer.
    """
    work = context.work_dir / "annotation"
    work.mkdir(parents=True, exist_ok=True)
    rows, out = work / "rows.jsonl", work / "found.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    task = {
        "nemo": str(nemo),
        "tokenizer": str(tokenizer),
        "rows": str(rows),
        "out": str(out),
        "batch_size": batch_size,
    }
    # On the CPU if the recipe says so; otherwise on a GPU where NeMo-Aligner's Python can use one.
    on_cpu = True if context.device == "cpu" else None
    run_task("annotate", task, work, log_file(context), context.progress, context.stop, on_cpu=on_cpu)
    return [json.loads(line) for line in out.read_text().splitlines()]
