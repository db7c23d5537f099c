"""Conversion between Hugging Face and NeMo checkpoints, in NeMo-Aligner's environment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.nemo_aligner.fork_server import ForkServer
from nemo_minitron.backends.alignment.nemo_aligner.model_config import nemo_model_config, tokenizer_dir
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.backends.alignment.nemo_aligner.weights import read_megatron_tensors, write_megatron_tensors
from nemo_minitron.hf.checkpoint import Checkpoint, copy_side_files
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.hf.tokenizer_files import TOKENIZER_FILE
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress


def to_nemo(
    model_dir: Path,
    out: Path,
    work_dir: Path,
    log: Path,
    progress: Progress,
    stop: StopRequest,
    *,
    seq_len_tokens: int,
    on_cpu: bool,
    tp: int = 1,
    server: ForkServer | None = None,
) -> dict[str, Any]:
    """Write the NeMo checkpoint folder `out`, and its tokenizer beside it; returns its model config.

    Args:
        server: see `run_task`.

    Raises:
        ConfigError: NeMo does not support this model.
        CheckpointError: the Hugging Face checkpoint is damaged.
    """
    shape = Checkpoint.open(model_dir).shape
    tokenizer = tokenizer_dir(out)
    _copy_tokenizer(model_dir, tokenizer)
    config = nemo_model_config(
        shape, tokenizer, seq_len_tokens=seq_len_tokens, on_cpu=on_cpu, where=str(model_dir), tp=tp
    )
    weights = work_dir / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    write_megatron_tensors(model_dir, weights)
    try:
        task = {"weights": str(weights), "model_config": config, "out": str(out)}
        run_task("to_nemo", task, work_dir, log, progress, stop, on_cpu=on_cpu, server=server)
    finally:
        shutil.rmtree(weights, ignore_errors=True)
    return config


def from_nemo(
    nemo_dir: Path,
    model_config: dict[str, Any],
    like: Path,
    out: Path,
    work_dir: Path,
    log: Path,
    progress: Progress,
    stop: StopRequest,
    *,
    on_cpu: bool | None = None,
    server: ForkServer | None = None,
) -> None:
    """Convert a NeMo checkpoint to a Hugging Face checkpoint with the config, dtype and tokenizer of `like`."""
    weights = work_dir / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    dtype = Checkpoint.open(like).dtype
    try:
        task = {"nemo": str(nemo_dir), "model_config": model_config, "out": str(weights), "dtype": dtype}
        run_task("from_nemo", task, work_dir, log, progress, stop, on_cpu=on_cpu, server=server)
        read_megatron_tensors(weights, like, out)
    finally:
        shutil.rmtree(weights, ignore_errors=True)


def _copy_tokenizer(model_dir: Path, out: Path) -> None:
    """Copy the tokenizer for transformers 4 in NeMo's environment: its class reads everything from tokenizer.json."""
    out.mkdir(parents=True, exist_ok=True)
    copy_side_files(model_dir, out)
    shutil.copyfile(model_dir / "config.json", out / "config.json")
    if not (out / TOKENIZER_FILE).is_file():
        load_tokenizer(model_dir).backend_tokenizer.save(str(out / TOKENIZER_FILE))
    settings = out / "tokenizer_config.json"
    if settings.is_file():
        content = json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(json.dumps({**content, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
