"""Evaluate one model: held-out loss, lm-eval tasks and sample texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.stages.artifacts import Model, TokenizedText
from nemo_minitron.stages.common.one_tokenizer import require_tokenizer_of
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.evaluate.params import EvaluateStage
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    data: TokenizedText


def evaluate(params: EvaluateStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Measure the held-out loss with Megatron, and run tasks with transformers, on all ranks; sample texts on rank 0.

    Write metrics.json.

    Raises:
        DataError: the text was made with another tokenizer than the model's.
        NumericsError: transformers and Megatron do not compute the same logits.
    """
    from nemo_minitron.backends.megatron.model.evaluate import heldout_loss
    from nemo_minitron.evaluation.metrics import bits_per_byte, perplexity
    from nemo_minitron.hf.checkpoint import model_facts

    require_tokenizer_of(inputs.model, inputs.data, ctx)
    model_dir = inputs.model.path
    if params.uses_transformers:
        from nemo_minitron.evaluation.agreement import require_agreement

        with ctx.open_session.main_works():
            if ctx.is_main:
                require_agreement(model_dir, ctx.logits_memory, ctx.open_session)
    heldout = heldout_loss(
        model_dir,
        inputs.data.path,
        num_tokens=params.num_tokens,
        seq_len_tokens=params.seq_len_tokens,
        precision=params.precision,
        session=ctx.open_session,
        progress=ctx.progress,
    )
    through_transformers = _through_transformers(params, model_dir, ctx)
    if not ctx.is_main:
        return {}
    facts = model_facts(model_dir)
    loss = heldout.nll_nats / heldout.num_tokens
    metrics = {
        "label": params.label,
        **{key: facts[key] for key in ("num_params", "num_params_non_embedding", "checkpoint_bytes", "dtype")},
        "loss_nats_per_token": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(heldout.nll_nats, heldout.num_bytes),
        "num_tokens": heldout.num_tokens,
        "num_bytes": heldout.num_bytes,
        "tasks_limit": params.tasks_limit,
        **through_transformers,
    }
    (ctx.out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return {key: value for key, value in metrics.items() if key != "samples"}


def _through_transformers(params: EvaluateStage, model_dir: Path, ctx: StageContext) -> dict[str, Any]:
    """Return {tasks, samples}. The model is loaded once on each rank that needs it: all of them for tasks."""
    if not params.uses_transformers:
        return {"tasks": {}, "samples": []}
    with ctx.open_session.main_works():
        if not (ctx.is_main or params.tasks):
            return {}
        return _tasks_and_samples(params, model_dir, ctx)


def _tasks_and_samples(params: EvaluateStage, model_dir: Path, ctx: StageContext) -> dict[str, Any]:
    from nemo_minitron.evaluation.agreement import load_compared
    from nemo_minitron.evaluation.generation import greedy_texts
    from nemo_minitron.evaluation.tasks import run_tasks
    from nemo_minitron.hf.source import resolve_path
    from nemo_minitron.hf.tokenizer import load_tokenizer

    session = ctx.open_session
    model = load_compared(model_dir, params.precision, str(session.device), memory=ctx.logits_memory, session=session)
    tokenizer = load_tokenizer(model_dir)
    results: dict[str, Any] = {"tasks": {}}
    if params.tasks:
        source = params.tasks_source
        found = run_tasks(
            model,
            tokenizer,
            params.tasks,
            data_dir=resolve_path(source, Path(ctx.execution.assets_dir)) if source else None,
            limit=params.tasks_limit,
            work_dir=ctx.work_dir,
            progress=ctx.progress,
            session=session,
        )
        results = {"tasks": found.scores, "tasks_lower_is_better": found.lower_is_better}
    prompts = params.prompts if ctx.is_main else ()
    return {**results, "samples": greedy_texts(model, tokenizer, prompts, params.max_new_tokens)}
