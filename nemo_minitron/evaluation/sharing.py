"""Work that the ranks of an evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.runtime.session import Session

_T = TypeVar("_T")


def share_out(
    requests: Sequence[_T], keys: Sequence[Hashable], compute: Callable[[list[_T]], list[Any]], session: Session | None
) -> list[Any]:
    """Compute the results of each rank's part of the requests, and return all results in their order on every rank.

    Args:
        keys: requests with the same key stay on one rank.
        compute: returns a result that JSON can hold for each request; lists in it arrive as tuples.
        session: every rank of it calls this function; None: this process computes everything.
    """
    if session is None or session.world_size == 1:
        return compute(list(requests))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    owners = [numbers[key] % session.world_size for key in keys]
    own = [request for request, owner in zip(requests, owners, strict=True) if owner == session.rank]
    parts = [iter(part) for part in session.gather(compute(own) if own else [])]
    found = [next(parts[owner]) for owner in owners]
    return [_with_tuples(result) for result in found]


def _with_tuples(value: Any) -> Any:
    """Return the value with tuples instead of lists; lm-eval expects (log-likelihood, is_greedy) as a tuple."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
