"""Score the importance of every channel, head and layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.errors import NumericsError, error_context
from nemo_minitron.stages.artifacts import Model, Scores, TokenizedText
from nemo_minitron.stages.common.one_tokenizer import require_tokenizer_of
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.score.params import ScoreStage

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.model.forward import Batch
    from nemo_minitron.pruning.choice_task import ChoiceTask


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    data: TokenizedText


def score(params: ScoreStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Score the teacher on calibration samples, and write scores.safetensors (fp64) and scores.json.

    Raises:
        DataError: the text was made with another tokenizer than the model's.
        NumericsError: a score is NaN or infinite.
    """
    from nemo_minitron.backends.megatron.model.weights import load_model
    from nemo_minitron.backends.megatron.scoring.depth_scores import DepthSamples, depth_scores
    from nemo_minitron.backends.megatron.scoring.stats import activation_scores
    from nemo_minitron.pruning.selection import require_finite

    require_tokenizer_of(inputs.model, inputs.data, ctx)
    session = ctx.open_session
    model, shape = load_model(
        inputs.model.path, session, precision=params.precision, seq_len_tokens=params.seq_len_tokens
    )
    scores = activation_scores(model, shape, _calibration(params, inputs, ctx), params, session)
    drawn = list(_batches(params, inputs, ctx, params.depth_samples)) if params.draws_depth_samples else []
    samples = DepthSamples(drawn, _task(params, inputs, ctx))
    layers, whole = depth_scores(model, shape, params, samples, session, ctx.progress)
    scores |= layers
    with error_context(NumericsError, where=f"stages.{ctx.name}"):
        require_finite(scores)
    facts = {
        "num_samples": params.num_samples,
        "seq_len_tokens": params.seq_len_tokens,
        **{f"baseline_{name}": value for name, value in whole.items()},
    }
    if ctx.is_main:
        Scores.save({name: tensor.contiguous() for name, tensor in scores.items()}, ctx.out_dir)
        (ctx.out_dir / "scores.json").write_text(json.dumps(facts, indent=2) + "\n")
    return {**facts, "scores": sorted(scores)}


def _calibration(params: ScoreStage, inputs: Inputs, ctx: StageContext) -> Iterator[Batch]:
    """Yield this rank's micro-batches of calibration samples, with a progress bar."""
    batches = _batches(params, inputs, ctx, params.num_samples)
    total = params.num_samples // (ctx.open_session.parallel.micro_batch_size * ctx.open_session.parallel.dp)
    yield from ctx.progress.track(batches, "score", total, "batches")


def _batches(params: ScoreStage, inputs: Inputs, ctx: StageContext, num_samples: int) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the first `num_samples` samples; depth and width use the same samples."""
    from nemo_minitron.backends.megatron.data.datasets import step_batches, training_samples

    session = ctx.open_session
    micro = session.parallel.micro_batch_size
    samples = training_samples(
        inputs.data.path,
        num_samples=max(params.num_samples, num_samples),
        seq_len_tokens=params.seq_len_tokens,
        seed=params.seed,
        cache_dir=ctx.work_dir / "data_index",
    )
    size = micro * session.parallel.dp
    for step in range(num_samples // size):
        yield from step_batches(samples, session, step=step, global_batch_size=size, micro_batch_size=micro)


def _task(params: ScoreStage, inputs: Inputs, ctx: StageContext) -> ChoiceTask | None:
    if "task" not in params.layer_metrics or params.depth_task is None:
        return None
    from nemo_minitron.evaluation.choice_task import load_choice_task
    from nemo_minitron.hf.checkpoint import read_config
    from nemo_minitron.hf.source import resolve_path
    from nemo_minitron.hf.tokenizer import load_tokenizer, require_known_ids

    task = params.depth_task
    folder = None if task.source is None else resolve_path(task.source, Path(ctx.execution.assets_dir))
    model_dir = inputs.model.path
    tokenizer = load_tokenizer(model_dir)
    loaded = load_choice_task(task.name, tokenizer, data_dir=folder, limit=task.limit)
    vocab_size = int(read_config(model_dir)["vocab_size"])
    for pair in loaded.pairs:
        require_known_ids(chain(*pair), vocab_size, tokenizer, str(model_dir))
    return loaded
