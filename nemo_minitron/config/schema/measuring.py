"""Keys of the stages that measure, export and report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.config.schema.base import Precision, Schema, StageName, TaskName


class CheckTeacherInputs(Schema):
    teacher: StageName = "teacher"
    data: StageName = "data"


class CheckTeacherStage(Schema):
    """Held-out loss of the teacher; a teacher above the bound stops the run before it costs anything."""

    kind: Literal["check_teacher"]
    inputs: CheckTeacherInputs = CheckTeacherInputs()
    max_loss: Annotated[float, Field(gt=0.0)]
    """Nats per token on the validation split."""
    num_tokens: PositiveInt = 16384
    seq_len_tokens: PositiveInt = 512
    precision: Precision = "bf16"


class EvaluateInputs(Schema):
    model: StageName
    data: StageName = "data"


class EvaluateStage(Schema):
    """Held-out loss and bits per byte, lm-eval tasks, and sample texts of one model."""

    kind: Literal["evaluate"]
    inputs: EvaluateInputs
    label: str
    """Column of the report: teacher, pruned, random, distilled."""
    num_tokens: PositiveInt = 32768
    """Held-out tokens for loss and bits per byte."""
    seq_len_tokens: PositiveInt = 512
    tasks: tuple[TaskName, ...] = ()
    """lm-eval task names."""
    tasks_source: str | None = None
    """`asset:NAME` with offline copies of the task data; null: lm-eval's own (needs the hub)."""
    tasks_limit: PositiveInt | None = None
    """Examples per task; null: all."""
    prompts: tuple[str, ...] = ()
    """Continued greedily for the report."""
    max_new_tokens: PositiveInt = 48
    precision: Precision = "bf16"


class SpeedMeasurement(Schema):
    """Prefill and generation speed through transformers on this machine."""

    prompt_tokens: PositiveInt = 128
    new_tokens: PositiveInt = 32
    rounds: PositiveInt = 3
    precision: Precision = "bf16"


class SpeedInputs(Schema):
    models: Annotated[dict[str, StageName], Field(min_length=1)]
    """Label -> stage. All are timed in one process, interleaved."""


class SpeedStage(SpeedMeasurement):
    """Prefill and generation speed of several models, side by side."""

    kind: Literal["speed"]
    inputs: SpeedInputs


class ExportInputs(Schema):
    model: StageName = "distill"
    teacher: StageName = "teacher"
    evaluations: tuple[StageName, ...] = ()


class ExportStage(Schema):
    """The finished model as plain `transformers` loads it, with a model card."""

    kind: Literal["export"]
    inputs: ExportInputs = ExportInputs()
    dtype: Literal["keep", "float32", "bfloat16"] = "bfloat16"
    model_name: str | None = None
    """Title of the model card; the recipe's name when None."""


class ReportInputs(Schema):
    stages: tuple[StageName, ...] | None = None
    """Stages that the report tells of; None: every other stage of the recipe."""


class ReportStage(Schema):
    """report.json, report.md and one self-contained report.html."""

    kind: Literal["report"]
    inputs: ReportInputs = ReportInputs()
    title: str | None = None
