"""Megatron's distributed optimizer (each data-parallel rank keeps a part of Adam's states) with torch's Adam.

Megatron assumes the fused Adam of Transformer Engine or Apex, which counts steps once per parameter group. Torch's Adam
has a step counter for each parameter; Megatron's loading makes all parameters share one counter tensor, so that after a
resume each step increments it once per parameter. This module keeps the counters separate. With a fused Adam it
leaves everything to Megatron.

The files contain whole tensors, or before 0.15 each rank's part of them; both can be read in another layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from nemo_minitron.backends.megatron.training.gathered_states import GatheredStates

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Stores whole tensors, so that a resume may use another layout."""
HAS_WHOLE_TENSORS = hasattr(DistributedOptimizer, "load_parameter_state_from_fully_reshardable")
"""True since 0.15; the two formats cannot read each other's files."""


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool
) -> tuple[dict[str, Any], GatheredStates | None]:
    """Return the optimizer's state as a checkpoint stores it, and what its tensors are to be collected from.

    The second is None if the tensors have their values already. Loading needs no values.
    """
    only = _only(optimizer)
    if is_loading and _is_torch_adam(only):
        _make_states(only)
    if not HAS_WHOLE_TENSORS:
        return _state_of_parts(only, model_state, is_loading=is_loading), None
    gathered = GatheredStates(only)
    with gathered.instead_of_all_states():
        state = dict(only.sharded_state_dict(model_state, is_loading=is_loading, metadata=SHARDING))
    return state, gathered


def _state_of_parts(only: DistributedOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Return the state as versions before 0.15 store it: each rank's part of each tensor."""
    if not _is_torch_adam(only):
        return dict(only.sharded_state_dict(model_state, is_loading=is_loading))
    state = dict(only.state_dict())
    with _without_counters(only):
        state["param_state"] = only.sharded_param_state_fs_model_space(model_state, is_loading)
    return state


def load_optimizer_state(chained: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Restore the optimizer's state from a checkpoint."""
    optimizer = _only(chained)
    if not _is_torch_adam(optimizer):
        optimizer.load_state_dict(state)
        return
    optimizer.load_state_dict({key: value for key, value in state.items() if key != "param_state"})
    with _without_counters(optimizer):
        if HAS_WHOLE_TENSORS:
            optimizer.load_parameter_state_from_fully_reshardable(state["param_state"])
        else:
            optimizer.load_parameter_state_from_fs_model_space(state["param_state"])


@contextmanager
def _without_counters(optimizer: DistributedOptimizer) -> Iterator[None]:
    """Hide the step counters, since Megatron expects states of the parameter's size; then restore separate counters."""
    adam = optimizer.optimizer
    counters = [(parameter, float(tensors.pop("step"))) for parameter, tensors in adam.state.items()]
    try:
        yield
    finally:
        fused = dict(_parameters(adam))
        for parameter, step in counters:
            adam.state[parameter]["step"] = _counter(step, parameter, is_fused=fused[parameter])


def _parameters(adam: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield each parameter, and whether its group uses the fused kernel."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            yield parameter, bool(group.get("fused"))


def _counter(step: float, parameter: torch.Tensor, *, is_fused: bool) -> torch.Tensor:
    """Return a step counter of torch's Adam. The fused kernel needs it on the parameter's device."""
    return torch.tensor(step, device=parameter.device if is_fused else "cpu")


def _only(optimizer: MegatronOptimizer) -> DistributedOptimizer:
    """Return the only optimizer of Megatron's chain, which has one per kind of parameter: a dense model has one."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if len(chain) != 1 or not isinstance(chain[0], DistributedOptimizer):
        raise AssertionError(f"expected one distributed optimizer, found {chain}")
    return chain[0]


def _is_torch_adam(optimizer: DistributedOptimizer) -> bool:
    return isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _make_states(optimizer: DistributedOptimizer) -> None:
    """Create the states that torch creates at the first step; Megatron cannot describe an optimizer without states."""
    adam = optimizer.optimizer
    for parameter, is_fused in _parameters(adam):
        if not adam.state[parameter]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": _counter(0.0, parameter, is_fused=is_fused), **moments}
