"""Keys of the stages that train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.config.schema.base import Fraction, Precision, Schema, StageName
from nemo_minitron.config.schema.losses import Loss


class DistillInputs(Schema):
    student: StageName = "prune"
    teacher: StageName = "teacher"
    data: StageName = "data"
    check: StageName | None = "check_teacher"
    """Waits for this teacher check to pass; null: no check."""
    cache: StageName | None = None
    """Learn from what a cache_teacher stage wrote; the teacher is then not loaded."""


class LossGuard(Schema):
    """When a training stops by itself. It never changes a result, so it does not enter fingerprints."""

    max_ratio: Annotated[float, Field(gt=1.0)] = 3.0
    """The bound: so many times the median loss of the last `window_steps` good steps (at least 10 of them)."""
    window_steps: Annotated[int, Field(ge=10)] = 50
    patience_steps: PositiveInt = 3
    """Steps in a row above the bound after which the training stops. Meanwhile no checkpoint is written."""


class Optimization(Schema):
    """How a model is trained, whatever it learns from."""

    global_batch_size: PositiveInt
    """Sequences per optimizer step."""
    seq_len_tokens: PositiveInt
    lr: Annotated[float, Field(gt=0.0)]
    """Peak; reached after the warm-up."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """End of the cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    precision: Precision = "bf16"
    valid_interval_steps: PositiveInt = 100
    valid_num_tokens: PositiveInt = 16384
    save_interval_steps: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    """Newest training checkpoints kept in the work folder."""
    seed: int = 1234
    guard: LossGuard | None = LossGuard()
    """Stops a training whose loss has blown up; null: only NaN and infinity do."""


class Training(Optimization):
    """How a student is trained, however long."""

    loss: Loss = Loss()


class DistillStage(Training):
    """Train the student to match its teacher."""

    kind: Literal["distill"]
    inputs: DistillInputs = DistillInputs()
    num_steps: PositiveInt


class TrainInputs(Schema):
    model: StageName = "teacher"
    data: StageName = "data"


class TrainStage(Optimization):
    """Train a model on the text itself, by next-token cross entropy."""

    kind: Literal["train"]
    inputs: TrainInputs = TrainInputs()
    num_steps: PositiveInt
