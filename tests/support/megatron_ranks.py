"""What each rank does in the tests of parallel layouts. Importable, so that spawned processes find it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from numpy.typing import NDArray

from nemo_minitron.config.schema import DistillStage, Parallel
from nemo_minitron.progress import Progress

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.session import Session

SILENT = Progress(silent=True)


def logits_of(
    models: list[tuple[Path, Path | None]], parallel: Parallel, tokens: list[list[int]]
) -> list[NDArray | None]:
    """Of each (model, folder to save it to again): the whole logits on the last stage's first rank, else None."""
    from nemo_minitron.backends.megatron.session import open_session

    with open_session(parallel, device="cpu", threads=1) as session:
        return [_logits(model_dir, out_dir, session, torch.tensor(tokens)) for model_dir, out_dir in models]


def _logits(model_dir: Path, out_dir: Path | None, session: Session, tokens: torch.Tensor) -> NDArray | None:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_minitron.backends.megatron.forward import evaluating, forward_batches
    from nemo_minitron.backends.megatron.weights import load_model, save_model
    from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter

    model, shape = load_model(model_dir, session, precision="fp32", seq_len_tokens=tokens.shape[1])
    collected = []
    with evaluating(model):
        forward_batches(model, [{"tokens": tokens}], session, lambda logits, _: collected.append(logits))
    if out_dir is not None:
        writer = CheckpointWriter(out_dir, Checkpoint.open(model_dir).config) if session.is_main else None
        save_model(model, shape, session, writer, dtype=torch.float32)
        if writer is not None:
            writer.close()
    if not collected:
        return None
    whole = gather_from_tensor_model_parallel_region(collected[0])[..., : shape.vocab_size]
    return whole.numpy() if session.tp_rank == 0 else None


def distill_losses(
    params: DistillStage, parallel: Parallel, student: Path, teacher: Path, data: Path, work: Path
) -> tuple[list[float], list[float]]:
    """(training losses, validation KLs) of a short distillation."""
    from nemo_minitron.backends.megatron import distill
    from nemo_minitron.backends.megatron.session import open_session

    with open_session(parallel, device="cpu", threads=1) as session:
        job = distill.prepare(params, student, teacher, data, work, session)
        curves = distill.run(job, work, SILENT)
    rows = curves.rows
    return (
        [row["train_loss"] for row in rows if "train_loss" in row],
        [row["valid_kl"] for row in rows if "valid_kl" in row],
    )


def scores_of(model_dir: Path, data: Path, parallel: Parallel, work: Path) -> dict[str, NDArray]:
    """Importance scores of every axis."""
    from nemo_minitron.backends.megatron.datasets import step_batches, training_samples
    from nemo_minitron.backends.megatron.session import open_session
    from nemo_minitron.backends.megatron.stats import activation_scores
    from nemo_minitron.backends.megatron.weights import load_model
    from nemo_minitron.config.schema import ScoreStage

    params = ScoreStage(kind="score", num_samples=8, seq_len_tokens=32, precision="fp32")
    with open_session(parallel, device="cpu", threads=1) as session:
        model, shape = load_model(model_dir, session, precision="fp32", seq_len_tokens=32)
        samples = training_samples(data, num_samples=8, seq_len_tokens=32, seed=0, cache_dir=work)
        size = parallel.dp * parallel.micro_batch_size
        batches = [
            batch
            for step in range(8 // size)
            for batch in step_batches(
                samples, session, step=step, global_batch_size=size, micro_batch_size=parallel.micro_batch_size
            )
        ]
        scores = activation_scores(model, shape, batches, params, session)
    return {name: score.numpy() for name, score in scores.items()}
