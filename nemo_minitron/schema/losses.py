"""Keys of the losses that a student is trained with."""

from __future__ import annotations

from math import cos, pi
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from nemo_minitron.schema.base import Schema


class TopK(Schema):
    """Keep the teacher's k most likely tokens. The papers found k up to 100 harmful, and more no better (2407.14679,
    A.5)."""

    kind: Literal["top_k"]
    k: PositiveInt
    """Tokens to keep."""
    tail: Literal["ghost", "drop"] = "ghost"
    """What happens to all other tokens. ghost: they count as one token. drop: both distributions are rescaled to the k
    tokens."""


class Sampled(Schema):
    """Keep tokens that are drawn from the teacher's distribution, which is unbiased where top-k is not (2503.16870)."""

    kind: Literal["sampled"]
    rounds: Annotated[int, Field(ge=1, le=64)] = 50
    """Draws with replacement for each token; about a quarter of them give different tokens."""


Sparse = Annotated[TopK | Sampled, Field(discriminator="kind")]


class LogitsLoss(Schema):
    """Distance between the next-token distributions of student and teacher (2407.14679, section 3)."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "mse", "cosine"] = "forward_kl"
    """The distance."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Both models' logits are divided by it. 1 was the best of 0.1, 0.5, 1 and 3 (2407.14679, A.5)."""
    times_temperature_squared: bool = False
    """Multiply the loss by T^2, so that gradients keep their size for every T. Not in the papers; no effect at T = 1.
    """
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the mixture of jsd. Towards 0 it behaves like forward KL, towards 1 like reverse KL."""
    of: Literal["probabilities", "logits"] = "probabilities"
    """What mse and cosine compare."""
    sparse: Sparse | None = None
    """Keep a part of the teacher's distribution only; with forward_kl only. null: all of it."""

    @model_validator(mode="after")
    def _sparse_is_forward_kl(self) -> LogitsLoss:
        if self.sparse is not None and self.kind != "forward_kl":
            raise ValueError(f"sparse goes with kind forward_kl, not {self.kind}")
        return self

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> LogitsLoss:
        if self.jsd_beta != 0.5 and self.kind != "jsd":
            raise ValueError(f"jsd_beta goes with kind jsd, not {self.kind}")
        if self.of != "probabilities" and self.kind not in ("mse", "cosine"):
            raise ValueError(f"of goes with kind mse or cosine, not {self.kind}")
        return self


class HiddenLoss(Schema):
    """Distance between hidden states, read after the norm that follows them (2407.14679, section 3, table 17).

    It helps when many layers are cut, and not otherwise (best practices 6 and 7). Where the widths differ, one learned
    linear layer, shared by all pairs, maps the student's states to the teacher's width.
    """

    kind: Literal["cosine", "mse"] = "cosine"
    """The distance. cosine was best (2407.14679, A.6)."""
    states: Annotated[tuple[Literal["block_output", "mlp_input"], ...], Field(min_length=1)] = ("block_output",)
    """Which hidden states to compare. mlp_input made no difference in the paper."""
    pairs: tuple[tuple[int, int], ...] = ((-3, -3),)
    """Pairs of (teacher layer, student layer), from 0, or negative from the end. The default is the papers' (last - 2)
    : (last - 2)."""
    embedding: bool = True
    """Compare the outputs of the embeddings as well."""
    weight: Annotated[float, Field(gt=0.0)] | Literal["dynamic"] = "dynamic"
    """Weight of this loss. dynamic: the size of the logit loss over the size of this one, in each micro-batch (the
    papers' alpha)."""

    @property
    def num_states(self) -> int:
        """Number of states of each model that are compared."""
        return int(self.embedding) + len(self.pairs) * len(set(self.states))


class AnchorLoss(Schema):
    """Squared error of what the student's layers compute inside, relative to the teacher's at the indices that the
    prune plan keeps: the mean over tokens, layers and `of`. Its weight falls to 0 during the training.

    Like the clone loss of 2505.12781, but without projections: everything that a pruned student computes has its
    counterpart among the teacher's neurons and channels. Pruned indices change what is best for the student, so
    the weight decays.
    """

    of: Annotated[tuple[Literal["gate_up", "attention_output", "mlp_output"], ...], Field(min_length=1)] = (
        "gate_up",
        "attention_output",
        "mlp_output",
    )
    """What is compared. gate_up: the outputs of the gate and the up projection."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Weight of this loss in the first step."""
    decay: Literal["linear", "cosine"] = "linear"
    """How the weight falls."""
    decay_steps: PositiveInt | None = None
    """Steps after which the weight is 0; from then on nothing is computed for this loss. null: all steps."""

    def weight_at(self, step: int, num_steps: int) -> float:
        """Return the weight in a step, counted from 0, of a training of `num_steps`."""
        left = max(0.0, 1.0 - step / (self.decay_steps or num_steps))
        return self.weight * (left if self.decay == "linear" else 0.5 - 0.5 * cos(pi * left))


class Loss(Schema):
    """`logits + next_token * cross entropy + weight * hidden + weight * anchors`. Terms that are null or 0 are not
    computed."""

    logits: LogitsLoss | None = LogitsLoss()
    """Distance between the distributions. null: none."""
    next_token: Annotated[float, Field(ge=0.0)] | Literal["balanced"] = 0.0
    """Weight of the cross entropy with the text. balanced: scaled to the size of the logit loss in each micro-batch.
    The papers leave this term out, because distillation alone was better (2407.14679, table 15)."""
    hidden: HiddenLoss | None = None
    """Distance between hidden states. null: none."""
    anchors: AnchorLoss | None = None
    """Distance inside the layers, at the indices of the prune plan; needs inputs.plan. null: none."""

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
    def is_lone_forward_kl(self) -> bool:
        """Whether the loss on logits is forward KL to whole distributions, without a loss on the text."""
        logits = self.logits
        return logits is not None and logits.kind == "forward_kl" and logits.sparse is None and not self.next_token

    @property
    def needs_teacher(self) -> bool:
        return self.logits is not None or self.hidden is not None or self.anchors is not None
