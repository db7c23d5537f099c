"""A vocabulary that may be split over tensor-parallel ranks, and the reductions that a loss needs.

Shapes: n tokens of a chunk, V the vocabulary part of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Vocab:
    """This rank's part [start, start + V) of the vocabulary, and reductions over the ranks that share it.

    The default is a single rank with the whole vocabulary.
    """

    start: int = 0
    rows: int | None = None
    """Rows of the output layer on each rank, padding included; None: as many as this rank has. The ranks must agree on
    sizes of blocks and on widths of gathered tensors, but the last ranks have fewer rows without padding."""
    size: int | None = None
    """Tokens of the whole vocabulary; None: as many as this rank has."""
    max: Callable[[Tensor], Tensor] = _same
    """May overwrite its argument."""
    sum: Callable[[Tensor], Tensor] = _same
    """May overwrite its argument."""
    gather: Callable[[Tensor], Tensor] = _same
    """[n, k] on each rank -> [n, k * ranks], in rank order."""


WHOLE = Vocab()


@dataclass(frozen=True)
class Softmax:
    """A softmax in parts: probabilities are `exp / total`, log-probabilities `shifted - log(total)`."""

    shifted: Tensor
    """logits / temperature - max [n, V]."""
    exp: Tensor
    """exp(shifted) [n, V]."""
    total: Tensor
    """Sum of exp over the whole vocabulary [n, 1]."""

    @property
    def probs(self) -> Tensor:
        return self.exp / self.total

    @property
    def log_probs(self) -> Tensor:
        return self.shifted - self.total.log()


def softmax(logits: Tensor, temperature: float, vocab: Vocab) -> Softmax:
    """Compute a softmax over the whole vocabulary. Overwrites the logits."""
    shifted = shift(logits, temperature, vocab)
    exp = shifted.exp()
    return Softmax(shifted, exp, vocab.sum(exp.sum(-1, keepdim=True)))


def shift(logits: Tensor, temperature: float, vocab: Vocab) -> Tensor:
    """Return logits / temperature - max over the whole vocabulary, in place."""
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.sub_(vocab.max(logits.amax(-1, keepdim=True)))


def pick(values: Tensor, ids: Tensor, vocab: Vocab) -> Tensor:
    """Return values [n, V] at vocabulary ids [n, k], from the ranks that have them: [n, k]."""
    local, mine = local_ids(ids, values.shape[-1], vocab)
    return vocab.sum(values.gather(-1, local) * mine)


def local_ids(ids: Tensor, size: int, vocab: Vocab) -> tuple[Tensor, Tensor]:
    """Return the columns of ids in this rank's part, and whether it has them; ids of other ranks get any column."""
    local = ids - vocab.start
    return local.clamp(0, size - 1), (local >= 0) & (local < size)
