"""Keys of evaluate stages."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from nemo_minitron.schema.base import Precision, Schema, StageName, StageParams, TaskName


class EvaluateInputs(Schema):
    """Stages that an evaluate stage reads."""

    model: StageName
    """Stage that provides the model."""
    data: StageName = "data"
    """Stage that provides the tokenized text."""


class EvaluateStage(StageParams):
    """Measure one model: held-out loss, bits per byte, lm-eval tasks, and sample texts."""

    kind: Literal["evaluate"]
    inputs: EvaluateInputs
    label: str
    """Name of the model in the report, such as teacher, pruned, random or distilled."""
    num_tokens: PositiveInt = 32768
    """Held-out tokens for loss and bits per byte."""
    seq_len_tokens: PositiveInt = 512
    """Tokens in each sequence."""
    tasks: tuple[TaskName, ...] = ()
    """Names of lm-eval tasks."""
    tasks_source: str | None = None
    """`asset:NAME`, or a folder with offline copies of the task data. null: lm-eval downloads them."""
    tasks_limit: PositiveInt | None = None
    """Use at most this many examples of each task. null: all."""
    prompts: tuple[str, ...] = ()
    """Prompts that are continued greedily for the report."""
    max_new_tokens: PositiveInt = 48
    """Tokens to generate for each prompt."""
    precision: Precision = "bf16"
    """Floating-point format of weights and activations."""

    @property
    def uses_transformers(self) -> bool:
        """Whether the model is also loaded into transformers."""
        return bool(self.tasks or self.prompts)
