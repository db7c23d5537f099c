"""Whole tensors of a distributed optimizer's states, of which each rank holds only those that it writes.

Each data-parallel rank has a part of the states, which ignores the bounds of parameters; checkpoints contain whole
tensors. Megatron gathers all states (12 bytes for each parameter of the model-parallel rank) in host memory of every
rank, which then writes some of them. It also takes a parameter's position in its padded buffer for a position without
the padding between buckets, so that states of later buckets are shifted where buckets are padded.

Here the tensors are views of memory that is reserved and empty. Megatron distributes the tensors over ranks by their
shapes, and then each rank collects its own ones, a bounded number of values at a time.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch import distributed as dist

KEYS = ("param", "exp_avg", "exp_avg_sq")
GATHERED_VALUES = 2**24
"""Values of all ranks that are gathered at a time: 64 MiB on the device of each rank."""
Intervals = list[tuple[int, int]]
"""[start, stop) of what this rank writes in one buffer, ascending."""


class GatheredStates:
    """The states of one optimizer as whole tensors, empty until `collect`."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        # The padding of a buffer is part of it, because Megatron's positions of parameters include it.
        self._whole = [{key: _reserved(buffer.numel) for key in KEYS} for buffer in optimizer.buffers]

    @contextmanager
    def instead_of_all_states(self) -> Iterator[None]:
        """Make Megatron describe these tensors instead of gathering all states on every rank."""
        found: dict[int, Any] = {}
        for number, ranges in enumerate(self._optimizer.gbuf_ranges):
            (dtype,) = ranges
            found[number] = {dtype: self._whole[number]}
        with patch.object(self._optimizer, "get_parameter_state_dp_zero", lambda **_: found):
            yield

    @torch.no_grad()
    def collect(self, state: Any) -> None:
        """Fill in the tensors that this rank writes. Every data-parallel rank calls this.

        Args:
            state: a state to save, whose tensors have been distributed over the ranks.
        """
        written = self._written(state)
        for number, ranges in enumerate(self._optimizer.gbuf_ranges):
            (of_buckets,) = ranges.values()
            for bucket, in_bucket in zip(self._optimizer.buffers[number].buckets, of_buckets, strict=True):
                for key, whole in self._whole[number].items():
                    self._collect(key, bucket, in_bucket["param_map"], whole, written[number][key])

    def _written(self, state: Any) -> list[dict[str, Intervals]]:
        """Return which values this rank writes: buffer -> key -> intervals."""
        out: list[dict[str, Intervals]] = [{key: [] for key in whole} for whole in self._whole]
        places = {
            tensor.untyped_storage().data_ptr(): (number, key)
            for number, whole in enumerate(self._whole)
            for key, tensor in whole.items()
        }
        for item in nested_values(state):
            if not isinstance(item, ShardedTensor) or item.data is None or not is_main_replica(item.replica_id):
                continue
            place = places.get(item.data.untyped_storage().data_ptr())
            if place is not None:
                if not item.data.is_contiguous():
                    raise AssertionError(f"{item.key}: the optimizer's states are not in one piece")
                start = item.data.storage_offset()
                out[place[0]][place[1]].append((start, start + item.data.numel()))
        return [{key: sorted(intervals) for key, intervals in keys.items()} for keys in out]

    def _collect(self, key: str, bucket: Any, parameters: dict[Tensor, Any], whole: Tensor, written: Intervals) -> None:
        """Gather one kind of state of one bucket, of which each rank has an equal part."""
        group = self._optimizer.data_parallel_group
        size = bucket.grad_data.numel() // group.size()
        at_once = max(1, GATHERED_VALUES // group.size())
        for first in range(0, size, at_once):
            last = min(size, first + at_once)
            own = torch.zeros(last - first, dtype=torch.float32, device=bucket.grad_data.device)
            for parameter, places in parameters.items():
                place = places["gbuf_local"]
                start, stop = max(first, place.start), min(last, place.end)
                if start < stop:
                    states = self._optimizer._get_main_param_and_optimizer_states(parameter)
                    own[start - first : stop - first] = states[key].flatten()[start - place.start : stop - place.start]
            parts = own.new_empty(group.size() * len(own))
            dist.all_gather_into_tensor(parts, own, group=group)
            for rank, part in enumerate(parts.view(group.size(), -1)):
                begin = bucket.offset + rank * size + first
                for start, stop in _overlaps(written, begin, begin + len(part)):
                    whole[start:stop].copy_(part[start - begin : stop - begin])


def _overlaps(intervals: Intervals, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of the intervals that are in [start, stop)."""
    at = max(0, bisect_right(intervals, (start, start)) - 1)
    while at < len(intervals) and intervals[at][0] < stop:
        begin, end = max(start, intervals[at][0]), min(stop, intervals[at][1])
        if begin < end:
            yield begin, end
        at += 1


def _reserved(size: int) -> Tensor:
    """Return zeros [size] whose memory the system provides when they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, max(1, size) * 4, flags=flags), dtype=torch.float32)[:size]
