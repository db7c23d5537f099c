"""Tensors of the teacher that another pipeline stage compares with its student's."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.backends.megatron.runtime.session import Session

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Move(Generic[Key]):
    """A tensor that `source` has and `target` needs; both are pipeline stages and may be the same."""

    key: Key
    source: int
    target: int


def transfer(
    local: Mapping[Key, Tensor],
    moves: Iterable[Move[Key]],
    sizes: Mapping[Key, tuple[int, ...]],
    dtype: torch.dtype,
    session: Session,
) -> dict[Key, Tensor]:
    """Make the moves in their order, which is the same on every stage; return the tensors that this stage needs.

    Args:
        local: tensors that this stage has.
        sizes: size of each tensor.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    found: dict[Key, Tensor] = {}
    for move in moves:
        if session.pp_rank == move.source == move.target:
            found[move.key] = local[move.key]
        elif session.pp_rank == move.source:
            dist.send(local[move.key].contiguous(), ranks[move.target], group=group)
        elif session.pp_rank == move.target:
            received = torch.empty(sizes[move.key], dtype=dtype, device=session.device)
            dist.recv(received, ranks[move.source], group=group)
            found[move.key] = received
    return found
