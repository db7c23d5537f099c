"""Keys that all trainings share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from nemo_minitron.schema.base import FITTING_SEED, Precision, Schema, Seed
from nemo_minitron.schema.losses import Loss, Sampled, Sparse

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class LossGuard(Schema):
    """When a training stops because its loss has blown up. The guard never changes a result, so it is not part of
    fingerprints."""

    max_ratio: Annotated[float, Field(gt=1.0)] = 3.0
    """A step is bad if its loss is above this multiple of the median loss of the last `window_steps` good steps (at
    least 10)."""
    window_steps: Annotated[int, Field(ge=10)] = 50
    """Number of good steps of which the median is taken."""
    patience_steps: PositiveInt = 3
    """Bad steps in a row after which the training stops. No checkpoint is written meanwhile."""


class LearningRate(Schema):
    """The schedule of a learning rate."""

    lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate, reached at the end of the warmup."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of the schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warmup."""
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate goes from lr to min_lr after the warmup. wsd: it stays at lr, and falls during the last
    wsd_decay_steps."""
    wsd_decay_steps: PositiveInt | None = None
    """Steps of the decay of wsd, which follows a cosine."""


class Optimization(LearningRate):
    """How a model is trained, independent of the loss."""

    global_batch_size: PositiveInt
    """Sequences per optimizer step."""
    seq_len_tokens: PositiveInt
    """Tokens in each sequence."""
    reset_attention_mask: bool = False
    """Keep the documents inside a packed sample apart: no token attends across the end of a document."""
    adam_beta1: Beta = 0.9
    """Adam's beta1."""
    adam_beta2: Beta = 0.95
    """Adam's beta2."""
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay."""
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the gradient. 0: no clipping."""
    precision: Precision = "bf16"
    """Floating-point format of weights and activations. bf16 keeps fp32 master weights."""
    valid_interval_steps: PositiveInt = 100
    """Steps between two measurements of the held-out loss."""
    valid_num_tokens: PositiveInt = 16384
    """Held-out tokens of each measurement."""
    save_interval_steps: PositiveInt = 100
    """Steps between two training checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of training checkpoints to keep in the work folder."""
    seed: Seed = 1234
    """Seed of the random numbers that order the samples."""
    guard: LossGuard | None = LossGuard()
    """Stops a training whose loss has blown up. null: only NaN and infinity stop it."""


class Training(Optimization):
    """How a student is trained, independent of the number of steps."""

    loss: Loss = Loss()
    """What the student is trained to minimize."""


class TeacherCorrection(LearningRate):
    """Learning rate of a teacher that is trained on the distillation data (2408.11796, section 2)."""

    pretraining_lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate of the teacher's pretraining. `lr` is a fifth of it unless given, as in the paper."""
    warmup_steps: Annotated[int, Field(ge=0)] = 120
    """Steps of linear warmup."""

    @model_validator(mode="before")
    @classmethod
    def _a_fifth(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("lr") is None and isinstance(data.get("pretraining_lr"), int | float):
            return {**data, "lr": data["pretraining_lr"] / 5}
        return data


class Fp8Teacher(Schema):
    """Run the layers of a fixed teacher in FP8, whose peak is twice that of bf16 on an H100 and later.

    Its logits change a little, so the KL to the bf16 teacher is measured on held-out text before each training. Needs
    Transformer Engine.
    """

    format: Literal["e4m3", "hybrid"] = "e4m3"
    """Number format of weights and activations. Both are the same in forward passes."""
    scaling: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How tensors are scaled to FP8's range. tensorwise: by the current maximum of each tensor. blockwise: of each
    block. mxfp8: of 32 values, on Blackwell. Delayed scaling is left out: Transformer Engine updates its scales in
    passes with gradients only."""
    max_kl: Annotated[float, Field(gt=0.0)] = 0.01
    """Largest KL from the bf16 teacher to the FP8 teacher, nats per token. The training does not start above it."""


class Distillation(Training):
    """How a student is distilled from its teacher."""

    num_steps: PositiveInt
    """Optimizer steps."""
    teacher_correction: TeacherCorrection | None = None
    """Train the teacher on the same text while the student learns from it (2408.11796, figure 5). null: the teacher
    stays fixed."""

    teacher_fp8: Fp8Teacher | None = None
    """Run the teacher in FP8. null: in `precision`."""

    @property
    def of_teacher(self) -> Optimization | None:
        """How the teacher is trained meanwhile: as the student, with another learning rate and without a teacher."""
        if self.teacher_correction is None:
            return None
        shared = {key: getattr(self, key) for key in Optimization.model_fields}
        own = {key: getattr(self.teacher_correction, key) for key in LearningRate.model_fields}
        return Optimization(**{**shared, **own})


class LayerDistillation(Optimization):
    """How the layers of a student are trained, each apart from the others, on the teacher's hidden states."""

    num_steps: PositiveInt
    """Optimizer steps."""
    seed: Seed = FITTING_SEED
    """Seed of the random numbers that order the samples. It differs from that of other trainings."""


class TextTraining(Optimization):
    """How a model is trained on text by next-token cross entropy."""

    num_steps: PositiveInt
    """Optimizer steps."""


class TeacherCaching(Schema):
    """Which part of a teacher's distributions is written to disk."""

    sparse: Sparse = Sampled(kind="sampled")
    """Which tokens of each distribution are kept."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of the distributions; the same as in the distillation."""
    num_samples: PositiveInt
    """Samples to cache, at least num_steps * global_batch_size of the distillation."""
    seq_len_tokens: PositiveInt
    """Tokens in each sequence."""
    precision: Precision = "bf16"
    """Floating-point format of weights and activations."""
    seed: Seed = 1234
    """Seed of the order of the samples and of the draws; the same as in the distillation."""
    reset_attention_mask: bool = False
    """Keep the documents inside a packed sample apart; the same as in the distillation."""
    valid_num_tokens: PositiveInt = 16384
    """Held-out tokens for which the teacher's loss and distributions are kept. The distillation's curves show the
    teacher's loss and the KL if its own valid_num_tokens is the same."""
