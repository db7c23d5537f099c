"""Measure the speed of several models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_minitron.stages.artifacts import Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.speed.params import SpeedStage


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    models: Mapping[str, Model]


def speed(params: SpeedStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Time all models in one process with interleaved rounds, so that they are comparable, and write speed.json.

    Raises:
        NumericsError: transformers and Megatron do not compute the same logits of a model.
    """
    import torch

    from nemo_minitron.evaluation.agreement import load_compared
    from nemo_minitron.evaluation.speed import measure_speed
    from nemo_minitron.hf.checkpoint import model_facts

    use_cuda = ctx.execution.device != "cpu" and torch.cuda.is_available()
    if ctx.execution.threads and not use_cuda:
        torch.set_num_threads(ctx.execution.threads)
    device = "cuda" if use_cuda else "cpu"
    folders = {label: model.path for label, model in inputs.models.items()}
    models = {
        label: load_compared(path, params.precision, device, memory=ctx.logits_memory)
        for label, path in folders.items()
    }
    with ctx.progress.bar("speed", params.rounds + 1, "rounds") as bar:
        measured = measure_speed(
            models,
            prompt_tokens=params.prompt_tokens,
            new_tokens=params.new_tokens,
            rounds=params.rounds,
            tick=bar.advance,
        )
    sizes = {label: model_facts(path) for label, path in folders.items()}
    document = {
        "device": device,
        "threads": torch.get_num_threads(),
        "precision": params.precision,
        "prompt_tokens": params.prompt_tokens,
        "new_tokens": params.new_tokens,
        "rounds": params.rounds,
        "relative_to": next(iter(models)),
        "models": {
            label: {**rates, **{key: sizes[label][key] for key in ("num_params", "checkpoint_bytes", "dtype")}}
            for label, rates in measured.items()
        },
    }
    (ctx.out_dir / "speed.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return document
