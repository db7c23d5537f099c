"""Functions that each rank runs in tests of parallel layouts. Importable, so that spawned processes find them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.cache_teacher.params import CacheTeacherStage
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.stages.score.params import ScoreStage
from nemo_minitron.system.progress import Progress

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.runtime.session import Session
    from nemo_minitron.backends.megatron.training.loop import Job
    from nemo_minitron.pruning.choice_task import ChoiceTask

SILENT = Progress(silent=True)


def logits_of(
    models: list[tuple[Path, Path | None]],
    parallel: Parallel,
    tokens: list[list[int]],
    device: str = "cpu",
    precision: str = "fp32",
) -> list[NDArray | None]:
    """Return the logits of each (model, folder to save it to again), on the last stage's first rank; else None."""
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(parallel, device=device, threads=1) as session:
        ids = torch.tensor(tokens, device=session.device)
        return [_logits(model_dir, out_dir, session, ids, precision) for model_dir, out_dir in models]


def _logits(
    model_dir: Path, out_dir: Path | None, session: Session, tokens: torch.Tensor, precision: str
) -> NDArray | None:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_minitron.backends.megatron.model.forward import evaluating, forward_batches
    from nemo_minitron.backends.megatron.model.weights import load_model, save_model
    from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter

    model, shape = load_model(model_dir, session, precision=precision, seq_len_tokens=tokens.shape[1])
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
    return whole.float().cpu().numpy() if session.tp_rank == 0 else None


def distill_losses(
    params: DistillStage, parallel: Parallel, student: Path, teacher: Path, data: Path, work: Path, device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Return (training losses, validation KLs) of a short distillation."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    with open_session(parallel, device=device, threads=1) as session:
        job = distill.prepare(params, student, teacher, data, work, session)
        curves = training.run(job, work, SILENT)
    rows = curves.rows
    return (
        [row["train_loss"] for row in rows if "train_loss" in row],
        [row["valid_kl"] for row in rows if "valid_kl" in row],
    )


def distill_until(
    params: DistillStage,
    parallel: Parallel,
    student: Path,
    teacher: Path,
    data: Path,
    work: Path,
    last_step: int,
    device: str = "cpu",
) -> list[float]:
    """Resume from the work folder up to a step, and return the training losses of all steps so far."""
    from dataclasses import replace

    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    with open_session(parallel, device=device, threads=1) as session:
        job = replace(distill.prepare(params, student, teacher, data, work, session), num_steps=last_step)
        rows = training.run(job, work, SILENT).rows
    return [row["train_loss"] for row in rows if "train_loss" in row]


def distill_until_beside_fused_adam(*args: Any) -> list[float]:
    """Run distill_until with Transformer Engine's or Apex's Adam, as far as Megatron can detect."""
    from unittest.mock import patch

    from megatron.core.optimizer import distrib_optimizer

    names = ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER")
    installed = {name: True for name in names if hasattr(distrib_optimizer, name)}
    assert installed, "without these names the test means nothing"
    with patch.multiple(distrib_optimizer, **installed):
        return distill_until(*args)


def distill_losses_beside_a_gpu(*args: Any) -> tuple[list[float], list[float]]:
    """Run distill_losses on the CPU of a machine that appears to have a GPU and Transformer Engine.

    This torch has no CUDA, so using it fails, and so does using the engine's layers.
    """
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from unittest.mock import patch

    engine = {name: ModuleType(name) for name in ("transformer_engine", "transformer_engine.pytorch")}
    for name, module in engine.items():
        module.__spec__ = ModuleSpec(name, None)
    from nemo_minitron.backends.megatron.model import layers

    with patch.object(torch.cuda, "is_available", lambda: True), patch.dict(sys.modules, engine):
        assert layers.has_transformer_engine()
        return distill_losses(*args)


Row = dict[str, float]


def corrected_rows(
    params: DistillStage, parallel: Parallel, student: Path, teacher: Path, data: Path, work: Path
) -> tuple[list[Row], list[Row]]:
    """Return the curves of a distillation with teacher correction, without times: in one run, and in two."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(parallel, device="cpu", threads=1) as session:

        def rows(name: str, last_step: int) -> list[Row]:
            folder = work / name
            folder.mkdir(exist_ok=True)
            return rows_until(distill.prepare(params, student, teacher, data, folder, session), folder, last_step)

        whole = rows("whole", params.num_steps)
        rows("resumed", params.num_steps // 2)
        return whole, rows("resumed", params.num_steps)


def rows_until(job: Job, work: Path, last_step: int) -> list[Row]:
    """Return the curves of all steps up to this one, without times."""
    from dataclasses import replace

    from nemo_minitron.backends.megatron.training import loop as training

    rows = training.run(replace(job, num_steps=last_step), work, SILENT).rows
    return [{key: row[key] for key in row if key not in ("tokens_per_s", "mfu")} for row in rows]


def scores_of(
    models: dict[str, Path],
    data: Path,
    parallel: Parallel,
    work: Path,
    cases: dict[str, tuple[str, ScoreStage]],
    device: str = "cpu",
) -> dict[tuple[str, str], dict[str, NDArray]]:
    """Return (model, case) -> every score; a case is a precision and the keys of a score stage."""
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(parallel, device=device, threads=1) as session:
        return {
            (model, case): _scores(folder, data, session, work, precision, params)
            for model, folder in models.items()
            for case, (precision, params) in cases.items()
        }


def _scores(
    model_dir: Path, data: Path, session: Session, work: Path, precision: str, params: ScoreStage
) -> dict[str, NDArray]:
    from nemo_minitron.backends.megatron.data.datasets import step_batches, training_samples
    from nemo_minitron.backends.megatron.model.weights import load_model
    from nemo_minitron.backends.megatron.scoring.depth_scores import DepthSamples, depth_scores
    from nemo_minitron.backends.megatron.scoring.stats import activation_scores

    length, number, micro = params.seq_len_tokens, params.num_samples, session.parallel.micro_batch_size
    model, shape = load_model(model_dir, session, precision=precision, seq_len_tokens=length)
    samples = training_samples(data, num_samples=number, seq_len_tokens=length, seed=0, cache_dir=work)
    size = session.parallel.dp * micro
    batches = [
        batch
        for step in range(number // size)
        for batch in step_batches(samples, session, step=step, global_batch_size=size, micro_batch_size=micro)
    ]
    scores = activation_scores(model, shape, batches, params, session)
    layers, whole = depth_scores(model, shape, params, DepthSamples(batches, choice_task()), session, SILENT)
    found = {name: score.numpy() for name, score in (scores | layers).items()}
    return {**found, **{f"whole {name}": np.array(value) for name, value in whole.items()}}


def choice_task() -> ChoiceTask:
    """Return ten questions with three answers of several lengths; the accuracy is smooth, to detect all errors."""
    from nemo_minitron.pruning.choice_task import ChoiceTask

    generator = np.random.default_rng(3)
    pairs = []
    for _ in range(10):
        question = tuple(generator.integers(1, 400, 9).tolist())
        pairs += [(question, tuple(generator.integers(1, 400, size).tolist())) for size in (1, 4, 6)]

    class Smooth(ChoiceTask):
        def accuracy(self, log_likelihoods: Sequence[float]) -> float:
            return float(np.mean(np.tanh(np.array(log_likelihoods) / 20)))

    return Smooth("made up", tuple(pairs), "acc", None, ())


def cache_shards(params: CacheTeacherStage, parallel: Parallel, teacher: Path, data: Path, work: Path) -> None:
    """Write a teacher cache into `work`."""
    from nemo_minitron.backends.megatron.distillation.teacher_cache import write_cache
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.distillation.cache import write_facts

    with open_session(parallel, device="cpu", threads=1) as session:
        facts = write_cache(params, teacher, data, work, session, SILENT)
    write_facts(work, facts)


def unequal_cache_shards(
    params: CacheTeacherStage, parallel: Parallel, teacher: Path, data: Path, work: Path, timeout_s: float
) -> None:
    """Write a teacher cache while rank 0 needs longer for a shard than a collective operation may wait."""
    from nemo_minitron.backends.megatron.distillation.teacher_cache import write_cache
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(parallel, device="cpu", threads=1) as session:

        def wait() -> None:
            session.set_timeout(timedelta(seconds=timeout_s))
            if session.is_main:
                time.sleep(2 * timeout_s)

        write_cache(params, teacher, data, work, session, SILENT, check_stop=wait)


def teacher_losses(
    live: DistillStage, cached: DistillStage, student: Path, teacher: Path, cache: Path, data: Path, work: Path
) -> list[float | None]:
    """Return the teacher's held-out loss in distillation: measured on the live teacher, and read from the cache."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(Parallel(), device="cpu", threads=1) as session:
        jobs = (
            distill.prepare(live, student, teacher, data, work, session),
            distill.prepare_cached(cached, student, cache, data, work, session),
        )
        return [job.objective.validate().get("valid_teacher_loss") for job in jobs]


def heldout_kls(
    params: Sequence[DistillStage], parallel: Parallel, student: Path, sources: Sequence[Path], data: Path, work: Path
) -> list[float | None]:
    """Return the student's held-out KL before any training, to a live teacher (a model) or to a cache."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(parallel, device="cpu", threads=1) as session:
        found = []
        for order, source in zip(params, sources, strict=True):
            prepare = distill.prepare_cached if (source / "cache.json").is_file() else distill.prepare
            found.append(prepare(order, student, source, data, work, session).objective.validate().get("valid_kl"))
        return found


def cached_losses(
    params: DistillStage, parallel: Parallel, student: Path, cache: Path, data: Path, work: Path
) -> tuple[list[float], list[float]]:
    """Return (training losses, validation losses) of a short distillation from a cache."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    with open_session(parallel, device="cpu", threads=1) as session:
        job = distill.prepare_cached(params, student, cache, data, work, session)
        rows = training.run(job, work, SILENT).rows
    return tuple([row[key] for row in rows if key in row] for key in ("train_loss", "valid_loss"))
