"""Train a model on text by next-token cross entropy."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.stages.artifacts import Model, TokenizedText
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.common.training import loop_options, training_facts
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.train.params import TrainStage


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    data: TokenizedText


def train(params: TrainStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Train a whole model by next-token prediction. After a kill, the training resumes from the work folder.

    Write the model as a Hugging Face checkpoint, curves.jsonl, data_used.json and tensorboard/.

    Raises:
        DataError: model and data do not share a tokenizer.
        DivergenceError: the loss became NaN or infinite, or stayed above its bound.
        Interrupted: a stop was requested.
    """
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.training import loop as training

    model, data = inputs.model, inputs.data
    require_one_tokenizer({"model": model}, data, ctx)
    job = distill.prepare_training(params, model.path, data.path, ctx.work_dir, ctx.open_session)
    curves = training.run(job, ctx.work_dir, ctx.progress, loop_options(ctx))
    model_facts = training.publish(job, model.path, ctx.work_dir, ctx.out_dir)
    facts = training_facts(job, curves, model, data)
    return {**model_facts, **facts} if ctx.is_main else {}
