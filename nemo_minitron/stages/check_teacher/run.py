"""Measure the teacher on held-out text before it is used."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nemo_minitron.errors import NumericsError
from nemo_minitron.stages.artifacts import Model, TokenizedText
from nemo_minitron.stages.check_teacher.params import CheckTeacherStage
from nemo_minitron.stages.common.one_tokenizer import require_tokenizer_of
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    teacher: Model
    data: TokenizedText


def check_teacher(params: CheckTeacherStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Measure the held-out loss of the teacher and compare it with `max_loss`.

    A teacher whose weights were not loaded has a loss of about ln(vocab_size) and is rejected here.

    Raises:
        DataError: the text was made with another tokenizer than the teacher's.
        NumericsError: the loss is above `max_loss`.
    """
    from nemo_minitron.backends.megatron.model.evaluate import heldout_loss

    require_tokenizer_of(inputs.teacher, inputs.data, ctx)
    measured = heldout_loss(
        inputs.teacher.path,
        inputs.data.path,
        num_tokens=params.num_tokens,
        seq_len_tokens=params.seq_len_tokens,
        precision=params.precision,
        session=ctx.open_session,
        progress=ctx.progress,
    )
    if not measured.loss <= params.max_loss:
        raise NumericsError(
            f"The teacher's held-out loss is {measured.loss:.3f} nats per token.",
            where=f"stages.{ctx.name}, teacher {inputs.teacher.path}",
            allowed=f"at most max_loss = {params.max_loss}",
            next_step="Check that the checkpoint is the right one and that the text has its language and format. "
            "If the loss is plausible for this text, raise max_loss.",
        )
    return {"loss_nats_per_token": measured.loss, "max_loss": params.max_loss, **asdict(measured)}
