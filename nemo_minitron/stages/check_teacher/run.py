"""Measure the teacher on held-out text before anything is built on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nemo_minitron.errors import NumericsError
from nemo_minitron.stages.artifacts import Model, TokenizedText
from nemo_minitron.stages.check_teacher.params import CheckTeacherStage
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """What the stage reads."""

    teacher: Model
    data: TokenizedText


def check_teacher(params: CheckTeacherStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Held-out loss of the teacher, which must stay under the recipe's bound.

    A teacher whose weights were never loaded scores about ln(vocab_size) and stops here.

    Raises:
        NumericsError: the loss is above `max_loss`.
    """
    from nemo_minitron.backends.megatron.model.evaluate import heldout_loss

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
            next_step="Wrong checkpoint or text in another language or format? "
            "If the loss is right for this text, raise max_loss.",
        )
    return {"loss_nats_per_token": measured.loss, "max_loss": params.max_loss, **asdict(measured)}
