"""Train the pruned student to match the teacher."""

from __future__ import annotations

import time

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import DistillStage
from nemo_minitron.errors import DataError
from nemo_minitron.stages.spec import Result, StageContext


def distill(params: DistillStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Logit distillation from the live teacher; resumes from the work folder after a kill.

    Writes the student as a Hugging Face checkpoint, curves.jsonl and tensorboard/.

    Raises:
        DataError: teacher and student do not share the data's tokenizer.
        NumericsError: the loss became NaN or infinite.
    """
    from nemo_minitron.backends.megatron import distill as loop

    student, teacher, data = inputs["student"], inputs["teacher"], inputs["data"]
    _require_one_tokenizer(inputs)
    started_s = time.monotonic()
    job = loop.prepare(params, student.path, teacher.path, data.path, ctx.work_dir, ctx.open_session)
    curves = loop.run(job, ctx.work_dir, ctx.progress)
    model_facts = loop.publish(job, student.path, ctx.work_dir, ctx.out_dir)
    if not ctx.is_main:
        return {}
    return {
        **model_facts,
        "license": student.result.get("license"),
        "data_sources": list(data.result.get("sources", ())),
        "num_steps": params.num_steps,
        "tokens": params.num_steps * job.tokens_per_step,
        "wall_s": time.monotonic() - started_s,
        **{f"initial_{key}": curves.first(key) for key in ("valid_loss", "valid_kl", "valid_teacher_loss")},
        **{f"final_{key}": curves.last(key) for key in ("valid_loss", "valid_kl", "train_loss")},
    }


def _require_one_tokenizer(inputs: Inputs) -> None:
    from nemo_minitron.data.tokenization import tokenizer_fingerprint

    prints = {role: tokenizer_fingerprint(inputs[role].path) for role in ("student", "teacher")}
    prints["data"] = str(inputs["data"].result.get("tokenizer_sha256", prints["teacher"]))
    if len(set(prints.values())) > 1:
        raise DataError(
            "Teacher, student and data were made with different tokenizers.",
            where=", ".join(f"{role} {inputs[role].path} ({value[:8]})" for role, value in prints.items()),
            next_step="Both models must share one vocabulary: tokenize the data with the teacher's tokenizer.",
        )
