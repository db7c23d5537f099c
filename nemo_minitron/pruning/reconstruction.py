"""Choice of the inputs of a linear layer to keep if least squares repairs it afterwards. Pure functions of tensors.

With the second moments A = E[a a^T] of the inputs, the error that is left after the repair (`pruning/compensation.py`)
when only the inputs S are kept is `tr B R_S`, with the Schur complement R_S = A - A_:S A_SS^-1 A_S: and B = W^T W. Two
searches for S, both of which give an order, so that one ranking serves every size:

- `greedy_order` adds the input that removes the most error: column-pivoted Cholesky with the exact gain.
- `obs_order` removes the input whose loss costs the least: Optimal Brain Surgeon as in ZipLM, OSSCAR (2403.12983) and
  Tyr-the-Pruner (2503.09657).

`swapped` then exchanges kept and removed inputs while that lowers the error (OSSCAR's local search).

Shapes: F inputs, in blocks of equal size that stay or go together, as the channels of a head do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-2
"""Added to A's diagonal, as a share of its mean (ZipLM, OSSCAR and Tyr-the-Pruner use the same)."""
_TINY = 1e-12
_State = tuple[Tensor, Tensor]
"""What a search keeps of one reader, two matrices [F, F]."""


def damped(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Return A + lambda I in fp64, [F, F]."""
    a = moments.double()
    mean = a.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return a + damping * mean * torch.eye(len(a), dtype=torch.float64, device=a.device)


@dataclass(frozen=True)
class Readers:
    """Linear layers that share one input, all of which least squares will repair."""

    moments: Tensor
    """A = E[a a^T] of the input [F, F]."""
    weight_gram: Tensor
    """B = W^T W of the weights, stacked [F, F]."""

    @property
    def relative(self) -> Readers:
        """The same in fp64, damped, with B divided by the mean squared output `tr B A`, so that sites compare.

        Rows of B of inputs that are always zero are zero, so that these are the least useful.
        """
        a = damped(self.moments)
        a = a / a.diagonal().mean()
        active = (self.moments.diagonal() > 0).double()
        gram = self.weight_gram.double() * active * active[:, None]
        return Readers(a, gram / (gram * a).sum().clamp_min(_TINY))


def greedy_order(readers: Iterable[Readers], *, block: int = 1, step: int = 1) -> list[int]:
    """Return all blocks, most useful first.

    The gain of adding block J, with the Schur complement R of the blocks so far, is `tr R_JJ^-1 (R B R)_JJ`.

    Args:
        readers: one for a choice inside a layer; several for inputs that are chosen once for all of them, as hidden
            channels are. Read once, so that a generator is never in memory as a whole.
        block: inputs in each block.
        step: blocks to add before the gains are computed again.
    """
    # R B R changes with R by one projection on both sides, so a step costs O(F^2) per block.
    states = [_greedy_state(some.relative) for some in readers]
    remaining, order = list(range(len(states[0][0]) // block)), list[int]()
    while remaining:
        gains = torch.stack([_block_ratio(_blocks(q, block), _blocks(r, block)) for r, q in states]).sum(0)[remaining]
        best = [remaining[place] for place in gains.topk(min(step, len(remaining))).indices.tolist()]
        order += best
        remaining = [number for number in remaining if number not in set(best)]
        _project(states, _positions(best, block))
    return order


def _greedy_state(scaled: Readers) -> _State:
    return scaled.moments, scaled.moments @ scaled.weight_gram @ scaled.moments


def obs_order(readers: Iterable[Readers], *, block: int = 1, step: int = 1) -> list[int]:
    """Return all blocks, most useful first: the reverse of the order in which they are removed.

    Removing block J from the kept inputs, whose inverse moments are P = A_SS^-1 and whose repaired weights are W, costs
    `tr W_J P_JJ^-1 W_J^T`. The weights are updated with each removal, through their Gram matrix W^T W.

    Args:
        readers: as of `greedy_order`.
        block: inputs in each block.
        step: blocks to remove before the costs are computed again (Tyr-the-Pruner removes 16 neurons or one head).
    """
    states = [_obs_state(some.relative) for some in readers]
    alive, removed = list(range(len(states[0][0]) // block)), list[int]()
    while alive:
        costs = torch.stack([_block_ratio(_blocks(g, block), _blocks(p, block)) for p, g in states]).sum(0)[alive]
        worst = [alive[place] for place in (-costs).topk(min(step, len(alive))).indices.tolist()]
        removed += worst
        alive = [number for number in alive if number not in set(worst)]
        _project(states, _positions(worst, block))
    return removed[::-1]


def _obs_state(scaled: Readers) -> _State:
    return torch.linalg.inv(scaled.moments), scaled.weight_gram


def _project(states: list[_State], positions: Tensor) -> None:
    """Apply `_projected` to one state after the other, so that two sets of them are never in memory."""
    for number, state in enumerate(states):
        states[number] = _projected(*state, positions)


def _projected(matrix: Tensor, weighted: Tensor, positions: Tensor) -> _State:
    """Return M - M_:J M_JJ^-1 M_J:, and Q - Q P - P^T Q + P^T Q P with P = M_JJ^-1 M_J: in the rows J."""
    mixed = torch.linalg.solve(_regular(matrix[positions][:, positions]), matrix[positions])
    weighted = weighted - weighted[:, positions] @ mixed
    weighted = weighted - mixed.T @ weighted[positions]
    return matrix - matrix[:, positions] @ mixed, weighted


def remaining_error(readers: Sequence[Readers], kept: Sequence[int], *, block: int = 1) -> float:
    """Return the share of the mean squared outputs that is lost after least squares has repaired all readers.

    It is the sum over the readers of `tr B R_S / tr B A`.
    """
    return sum(_error(some.relative, _positions(kept, block)) for some in readers)


def _error(scaled: Readers, positions: Tensor) -> float:
    return float((scaled.weight_gram * _schur(scaled.moments, positions)).sum())


def _schur(a: Tensor, positions: Tensor) -> Tensor:
    cross = a[:, positions]
    return a - cross @ torch.linalg.solve(cross[positions], cross.T)


def swapped(
    readers: Iterable[Readers], kept: Sequence[int], *, rounds: int = 20, block: int = 1, groups: int = 1
) -> list[int]:
    """Exchange kept and removed blocks while that lowers `remaining_error` (OSSCAR, local search).

    In each round the kept block that costs the least goes, and the removed block with the largest gain comes.

    Args:
        groups: number of equal runs of blocks. Blocks are exchanged inside of a run only, as the heads of a query group
            are: each round then takes the best exchange of any run.

    Returns:
        The kept blocks, in ascending order.
    """
    scaled = [some.relative for some in readers]
    members = (torch.arange(len(scaled[0].moments) // block)).chunk(groups)

    def error(blocks: Sequence[int]) -> float:
        return sum(_error(some, _positions(blocks, block)) for some in scaled)

    best = sorted(kept)
    lowest = error(best)
    for _ in range(rounds):
        cost = torch.stack([_removal_costs(some, best, block) for some in scaled]).sum(0)
        swaps = [_swap(scaled, best, cost, block, some) for some in members]
        errors = [lowest if candidate == best else error(candidate) for candidate in swaps]
        if min(errors) >= lowest:
            break
        best, lowest = swaps[errors.index(min(errors))], min(errors)
    return best


def _swap(scaled: Sequence[Readers], kept: list[int], cost: Tensor, block: int, members: Tensor) -> list[int]:
    """Return the kept blocks after the best exchange among `members`; the same blocks if there is none.

    Args:
        cost: what the removal of each kept block costs.
    """
    inside = torch.isin(torch.tensor(kept), members)
    if not bool(inside.any()) or int(inside.sum()) == len(members):
        return kept
    goes = int(torch.where(inside, cost, torch.inf).argmin())
    stays = [number for place, number in enumerate(kept) if place != goes]
    # One reader after the other: hidden channels have two in each layer.
    gains = sum(_gains(some, _positions(stays, block), block) for some in scaled)
    assert isinstance(gains, Tensor)
    allowed = torch.full_like(gains, -torch.inf).index_copy(0, members, gains[members])
    allowed[torch.tensor(stays)] = -torch.inf
    return sorted([*stays, int(allowed.argmax())])


def _gains(scaled: Readers, kept: Tensor, block: int) -> Tensor:
    """Return the error that each block would remove from one reader if it were added to the kept inputs."""
    r = _schur(scaled.moments, kept)
    return _block_ratio(_blocks(r @ scaled.weight_gram @ r, block), _blocks(r, block))


def best_in_groups(order: Sequence[int], size: int, groups: int) -> list[int]:
    """Return the first blocks of an order, `size` in all and as many in each of the equal runs of blocks."""
    each = len(order) // groups
    return [
        block
        for group in range(groups)
        for block in [number for number in order if number // each == group][: size // groups]
    ]


def _removal_costs(scaled: Readers, kept: list[int], block: int) -> Tensor:
    positions = _positions(kept, block)
    inverse = torch.linalg.inv(scaled.moments[positions][:, positions])
    # Repaired weights W A_:S A_SS^-1, through their Gram matrix.
    solved = scaled.moments[:, positions] @ inverse
    return _block_ratio(_blocks(solved.T @ scaled.weight_gram @ solved, block), _blocks(inverse, block))


def _positions(blocks: Sequence[int], size: int) -> Tensor:
    return (torch.tensor(blocks)[:, None] * size + torch.arange(size)).flatten()


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the diagonal blocks [F / size, size, size]."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _block_ratio(over: Tensor, under: Tensor) -> Tensor:
    """Return tr(under^-1 over) of each block."""
    if under.shape[-1] == 1:
        return (over / under.clamp_min(_TINY)).flatten()
    return torch.linalg.solve(_regular(under), over).diagonal(dim1=-2, dim2=-1).sum(-1)


def _regular(blocks: Tensor) -> Tensor:
    """Add enough to the diagonals of blocks that are used up to keep them invertible."""
    return blocks + _TINY * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
