"""Keys of the losses that a student is trained with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from nemo_minitron.schema.base import Schema


class TopK(Schema):
    """Only the teacher's k likeliest tokens. The papers saw harm up to 100 and no gain beyond (2407.14679, A.5)."""

    kind: Literal["top_k"]
    k: PositiveInt
    tail: Literal["ghost", "drop"] = "ghost"
    """All other tokens count as one (ghost), or both distributions are scaled to the k tokens (drop)."""


class Sampled(Schema):
    """Tokens drawn from the teacher's distribution: unbiased where top-k is not (2503.16870)."""

    kind: Literal["sampled"]
    rounds: Annotated[int, Field(ge=1, le=64)] = 50
    """Draws with replacement for each token; about a quarter of them are different tokens."""


Sparse = Annotated[TopK | Sampled, Field(discriminator="kind")]


class LogitsLoss(Schema):
    """Distance of the student's next-token distribution from the teacher's (2407.14679, section 3)."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "mse", "cosine"] = "forward_kl"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Both models' logits are divided by it. 1 was best of 0.1, 0.5, 1, 3 (2407.14679, A.5)."""
    times_temperature_squared: bool = False
    """Scale the loss by T^2, so that gradients keep their size for every T. Not in the papers; no effect at T = 1."""
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the teacher in the mixture of jsd; towards 0 it behaves as forward KL, towards 1 as reverse KL."""
    of: Literal["probabilities", "logits"] = "probabilities"
    """What mse and cosine compare."""
    sparse: Sparse | None = None
    """Keep a part of the teacher's distribution only; forward_kl alone."""

    @model_validator(mode="after")
    def _sparse_is_forward_kl(self) -> LogitsLoss:
        if self.sparse is not None and self.kind != "forward_kl":
            raise ValueError(f"sparse goes with kind forward_kl, not {self.kind}")
        return self


class HiddenLoss(Schema):
    """Distance of hidden states, read after the norm that follows them (2407.14679, section 3, table 17).

    It helps when depth is cut a lot, and not otherwise (best practices 6 and 7). Where the widths differ one learned
    linear layer, shared by all pairs, brings the student's states to the teacher's width.
    """

    kind: Literal["cosine", "mse"] = "cosine"
    """cosine was best (2407.14679, A.6)."""
    states: Annotated[tuple[Literal["block_output", "mlp_input"], ...], Field(min_length=1)] = ("block_output",)
    """mlp_input made no difference there."""
    pairs: tuple[tuple[int, int], ...] = ((-3, -3),)
    """(teacher layer, student layer), from 0, negative from the end: the papers' (last - 2) : (last - 2)."""
    embedding: bool = True
    """The embeddings' output as well."""
    weight: Annotated[float, Field(gt=0.0)] | Literal["dynamic"] = "dynamic"
    """dynamic: the size of the logit loss over the size of this one, of each micro-batch (the papers' alpha)."""


class Loss(Schema):
    """`logits + next_token * CE + weight * hidden`; what is null or zero is not computed."""

    logits: LogitsLoss | None = LogitsLoss()
    next_token: Annotated[float, Field(ge=0.0)] | Literal["balanced"] = 0.0
    """Weight of the cross entropy with the text itself. balanced: scaled to the size of the logit loss in each
    micro-batch. The papers leave it out: distillation alone was better (2407.14679, table 15)."""
    hidden: HiddenLoss | None = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> Loss:
        if self.logits is None and not self.next_token:
            raise ValueError("give logits, or a next_token weight: a student cannot be trained by hidden states alone")
        if self.logits is None and self.next_token == "balanced":
            raise ValueError("next_token = balanced needs logits to be balanced with")
        if self.logits is None and self.hidden is not None and self.hidden.weight == "dynamic":
            raise ValueError("hidden.weight = dynamic needs logits; give a number")
        return self

    @property
    def needs_teacher(self) -> bool:
        return self.logits is not None or self.hidden is not None
