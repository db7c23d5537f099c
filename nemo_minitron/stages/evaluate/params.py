"""Keys of evaluate stages."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from nemo_minitron.schema.base import Precision, Schema, StageName, StageParams, TaskName


class EvaluateInputs(Schema):
    model: StageName
    data: StageName = "data"


class EvaluateStage(StageParams):
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
