"""Offline distillation: a teacher's top logits are cached, then a student is trained on them."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.backends.alignment.base import TeacherObjective
from nemo_minitron.stages.artifacts import ChatRows, Model
from nemo_minitron.stages.common.alignment_rows import write_rows
from nemo_minitron.stages.common.alignment_training import train_and_publish
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.distill_offline.params import DistillOfflineStage
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    teacher: Model
    chats: ChatRows


def distill_offline(params: DistillOfflineStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Distill on conversations; publish a Hugging Face model and the curves.

    Raises:
        DataError: rows that cannot be used, or two tokenizers.
        Others as in the stage `sft`.
    """
    rows = write_rows(params, inputs.model, inputs.chats, ctx, "sft")
    models = {"model": inputs.model, "teacher": inputs.teacher}
    require_one_tokenizer(models, None, ctx, texts=(rows.train, rows.valid))
    objective = TeacherObjective(
        teacher_dir=inputs.teacher.path,
        top_k=params.top_k,
        kd_loss=params.kd_loss,
        kd_loss_weight=params.kd_loss_weight,
        sft_loss_weight=params.sft_loss_weight,
    )
    return train_and_publish(params, objective, inputs.model.path, rows, ctx, template=params.template)
