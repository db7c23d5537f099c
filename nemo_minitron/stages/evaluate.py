"""How good one model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import EvaluateStage
from nemo_minitron.stages.spec import Result, StageContext


def evaluate(params: EvaluateStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Held-out loss through Megatron on every rank; tasks and sample texts through transformers on the main one.

    Writes metrics.json.
    """
    from nemo_minitron.backends.megatron.evaluate import heldout_loss
    from nemo_minitron.evaluation.metrics import bits_per_byte, perplexity
    from nemo_minitron.hf.checkpoint import model_facts

    model_dir = inputs["model"].path
    heldout = heldout_loss(
        model_dir,
        inputs["data"].path,
        num_tokens=params.num_tokens,
        seq_len_tokens=params.seq_len_tokens,
        precision=params.precision,
        session=ctx.open_session,
        progress=ctx.progress,
    )
    if not ctx.is_main:
        return {}
    facts = model_facts(model_dir)
    metrics = {
        "label": params.label,
        "num_params": facts["num_params"],
        "num_params_non_embedding": facts["num_params_non_embedding"],
        "checkpoint_bytes": facts["checkpoint_bytes"],
        "loss_nats_per_token": heldout.loss,
        "perplexity": perplexity(heldout.loss),
        "bits_per_byte": bits_per_byte(heldout.nll_nats, heldout.num_bytes),
        "num_tokens": heldout.num_tokens,
        "num_bytes": heldout.num_bytes,
        "tasks": _tasks(params, model_dir, ctx),
        "samples": _samples(params, model_dir, ctx),
    }
    (ctx.out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return {key: value for key, value in metrics.items() if key != "samples"}


def _tasks(params: EvaluateStage, model_dir: Path, ctx: StageContext) -> dict[str, Any]:
    if not params.tasks:
        return {}
    from nemo_minitron.evaluation.tasks import run_tasks
    from nemo_minitron.hf.source import resolve_path

    with ctx.progress.bar(f"lm-eval {', '.join(params.tasks)}", 1, "runs") as bar:
        data_dir = resolve_path(params.tasks_source, Path(ctx.execution.assets_dir)) if params.tasks_source else None
        scores = run_tasks(
            model_dir,
            params.tasks,
            data_dir=data_dir,
            limit=params.tasks_limit,
            precision=params.precision,
            device=str(ctx.open_session.device),
        )
        bar.advance(1, **{task: found.get("acc_norm", found.get("acc", 0.0)) for task, found in scores.items()})
    return scores


def _samples(params: EvaluateStage, model_dir: Path, ctx: StageContext) -> list[dict[str, str]]:
    if not params.prompts:
        return []
    from nemo_minitron.evaluation.generation import greedy_texts, load_for_inference

    model = load_for_inference(model_dir, params.precision, str(ctx.open_session.device))
    return greedy_texts(model, model_dir, params.prompts, params.max_new_tokens)
