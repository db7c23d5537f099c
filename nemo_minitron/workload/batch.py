"""The batch size that suits a number of training tokens, and the keys that follow from it.

Sources: the batch size of the lowest loss for a number of tokens D is 0.0306 D^0.383 sequences of 2,048 tokens, nearly
independent of the model's size ("Power Lines", 2505.13738). Half or twice that size is about as good (2607.01487). When
the batch changes, Adam's beta2 keeps its half-life in tokens (2507.07101), and weight decay keeps the timescale of
AdamW, batch / (lr * weight_decay * D) (2405.13698, 2505.13738).

The fit is for training from scratch on text, of 0.1B tokens and more. There is no fit for distillation, whose gradients
have less noise, so that still smaller batches may suit it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.schema.training import Optimization

FACTOR, EXPONENT, FITTED_SEQ_LEN_TOKENS = 0.0306, 0.383, 2048
"""B_opt = FACTOR * D ** EXPONENT, in sequences of this length."""
PLATEAU = 2.0
"""Batches up to this multiple of the best one, or down to its inverse, are about as good."""
FEW_TOKENS = 10_000_000_000
"""Below this number, trainings with the batches of the published recipes (4.7 to 9.4 million tokens) need several times
as many tokens."""


def best_batch_tokens(num_tokens: float) -> float:
    """Return the batch, in tokens, of the lowest loss after this number of training tokens."""
    return FITTED_SEQ_LEN_TOKENS * FACTOR * float(num_tokens**EXPONENT)


@dataclass(frozen=True)
class BatchProposal:
    """A training's batch, that of the rule, and the keys with which the training reads as many tokens in it."""

    num_tokens: int
    batch_tokens: int
    best_batch_tokens: int
    global_batch_size: int
    num_steps: int
    warmup_steps: int
    adam_beta2: float
    weight_decay: float
    """Weight decay that belongs to the same learning rate."""

    @property
    def is_too_large(self) -> bool:
        """Whether the training has few tokens and a batch above the plateau: more and smaller steps would help."""
        return self.num_tokens < FEW_TOKENS and self.batch_tokens > PLATEAU * self.best_batch_tokens


def batch_proposal(keys: Optimization, num_steps: int, sequences_at_once: int = 1) -> BatchProposal:
    """Apply the rule to a training.

    Args:
        sequences_at_once: the batch must be a multiple of this, dp * micro_batch_size of the layout.
    """
    batch_tokens = keys.global_batch_size * keys.seq_len_tokens
    num_tokens = num_steps * batch_tokens
    best = best_batch_tokens(num_tokens)
    size = sequences_at_once * max(1, round(best / keys.seq_len_tokens / sequences_at_once))
    ratio = size / keys.global_batch_size
    return BatchProposal(
        num_tokens=num_tokens,
        batch_tokens=batch_tokens,
        best_batch_tokens=round(best),
        global_batch_size=size,
        num_steps=max(1, round(num_steps / ratio)),
        warmup_steps=round(keys.warmup_steps / ratio),
        adam_beta2=keys.adam_beta2**ratio,
        weight_decay=keys.weight_decay * ratio,
    )
