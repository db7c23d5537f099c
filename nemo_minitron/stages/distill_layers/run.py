"""Train every layer of the pruned student on the teacher's hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.stages.artifacts import Model, PrunePlanArtifact, TokenizedText
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.common.training import loop_options, plan_between, training_facts
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.distill_layers.params import DistillLayersStage
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    student: Model
    teacher: Model
    plan: PrunePlanArtifact
    data: TokenizedText


def distill_layers(params: DistillLayersStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Train the student's layers, each apart from the others. After a kill, the training resumes.

    Write the student as a Hugging Face checkpoint, curves.jsonl, data_used.json and tensorboard/.

    Raises:
        ArtifactError: the plan does not lead from the teacher to the student.
        DataError: teacher, student and data do not share a tokenizer.
        DivergenceError: the loss became NaN or infinite, or stayed above its bound.
        Interrupted: a stop was requested.
    """
    from nemo_minitron.backends.megatron.distillation import layerwise
    from nemo_minitron.backends.megatron.training import loop as training

    session = ctx.open_session
    student, teacher, data = inputs.student, inputs.teacher, inputs.data
    require_one_tokenizer({"student": student, "teacher": teacher}, data, ctx)
    plan = plan_between(inputs.plan, teacher, student)
    job = layerwise.prepare(params, plan, student.path, teacher.path, data.path, ctx.work_dir, session)
    curves = training.run(job, ctx.work_dir, ctx.progress, loop_options(ctx))
    model_facts = training.publish(job, student.path, ctx.work_dir, ctx.out_dir)
    facts = training_facts(job, curves, student, data)
    if not ctx.is_main:
        return {}
    columns = [f"{layerwise.LAYER_LOSS}_{number}" for number in range(student.shape.num_layers)]
    return {
        **model_facts,
        **facts,
        "initial_layer_losses": [curves.first(column) for column in columns],
        "final_layer_losses": [curves.last(column) for column in columns],
        "loss": "relative squared error of the output of each layer, from the teacher's own input",
    }
