"""Keys that all trainings share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from nemo_minitron.schema.base import Precision, Schema, Seed
from nemo_minitron.schema.losses import Loss, Sampled, Sparse

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class LossGuard(Schema):
    """When a training stops by itself. It never changes a result, so it does not enter fingerprints."""

    max_ratio: Annotated[float, Field(gt=1.0)] = 3.0
    """The bound: so many times the median loss of the last `window_steps` good steps (at least 10 of them)."""
    window_steps: Annotated[int, Field(ge=10)] = 50
    patience_steps: PositiveInt = 3
    """Steps in a row above the bound after which the training stops. Meanwhile no checkpoint is written."""


class LearningRate(Schema):
    """Its course over a training."""

    lr: Annotated[float, Field(gt=0.0)]
    """Peak; reached after the warm-up."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """End of the schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the rate goes from lr to min_lr after the warm-up. wsd: it stays, and falls in the last wsd_decay_steps."""
    wsd_decay_steps: PositiveInt | None = None
    """Of wsd; its decay is a cosine."""


class Optimization(LearningRate):
    """How a model is trained, whatever it learns from."""

    global_batch_size: PositiveInt
    """Sequences per optimizer step."""
    seq_len_tokens: PositiveInt
    reset_attention_mask: bool = False
    """Tokens do not look back over the end of a document inside a packed sample."""
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.95
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
    seed: Seed = 1234
    guard: LossGuard | None = LossGuard()
    """Stops a training whose loss has blown up; null: only NaN and infinity do."""


class Training(Optimization):
    """How a student is trained, however long."""

    loss: Loss = Loss()


class TeacherCorrection(LearningRate):
    """The learning rate of a teacher that is trained on the distillation data (2408.11796, section 2)."""

    pretraining_lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate that the teacher was pretrained with; `lr` is a fifth of it unless given, as in the paper."""
    warmup_steps: Annotated[int, Field(ge=0)] = 120

    @model_validator(mode="before")
    @classmethod
    def _a_fifth(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("lr") is None and isinstance(data.get("pretraining_lr"), int | float):
            return {**data, "lr": data["pretraining_lr"] / 5}
        return data


class Distillation(Training):
    """How a student is distilled from its teacher."""

    num_steps: PositiveInt
    teacher_correction: TeacherCorrection | None = None
    """The teacher goes on learning from the text of every step while it teaches (2408.11796, figure 5)."""

    @property
    def of_teacher(self) -> Optimization | None:
        """How the teacher is trained meanwhile: as the student but for the learning rate, and on the text alone."""
        if self.teacher_correction is None:
            return None
        shared = {key: getattr(self, key) for key in Optimization.model_fields}
        own = {key: getattr(self.teacher_correction, key) for key in LearningRate.model_fields}
        return Optimization(**{**shared, **own})


class TextTraining(Optimization):
    """How a model is trained on text by next-token cross entropy."""

    num_steps: PositiveInt


class TeacherCaching(Schema):
    """Which part of a teacher's distributions is written to disk."""

    sparse: Sparse = Sampled(kind="sampled")
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    num_samples: PositiveInt
    """At least num_steps * global_batch_size of the distillation."""
    seq_len_tokens: PositiveInt
    precision: Precision = "bf16"
    seed: Seed = 1234
    """Of the order of the samples and of the draws; as in the distillation."""
    reset_attention_mask: bool = False
    """The teacher's tokens do not look back over the end of a document; as in the distillation."""
    valid_num_tokens: PositiveInt = 16384
    """Held-out tokens that the teacher's loss is measured on, and that it is asked about for the distillation's KL. The
    distillation's curves show both when it has the same number."""
