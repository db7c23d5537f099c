"""Bytes of the tensors that a rank gives to collective operations, counted by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class VectorBytes(TorchDispatchMode):
    """Sums the size of the vector of each collective operation inside the context.

    It is the larger one of inputs and outputs. By a ring a rank sends at most twice this for an all-reduce, and at most
    once for the others, however many ranks there are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_operation: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.of_operation.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.of_operation[func.name().removeprefix("c10d::")] += max(map(_bytes, args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))
