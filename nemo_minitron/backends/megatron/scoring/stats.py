"""Collect importance statistics with hooks on a Megatron model.

Every rank accumulates its own layers and channels into zero tensors of the whole model's size. One sum over all ranks
then gives every rank the complete statistics, in any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from nemo_minitron.backends.megatron.model.forward import Batch, backward_batches, evaluating, forward_batches
from nemo_minitron.backends.megatron.model.parts import Layer, Model, layers
from nemo_minitron.backends.megatron.runtime.layout import shard_range
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.scoring.layer_stream import LayerStream
from nemo_minitron.families import ModelShape
from nemo_minitron.families.axes import SCORED_WIDTH_AXES, Axis, ScoredAt
from nemo_minitron.families.registry import axes_of
from nemo_minitron.pruning.importance import (
    CONVENTIONS,
    METHODS,
    NUM_SUMS,
    Aggregation,
    Convention,
    Method,
    aggregate_batch,
    aggregate_sequence,
    batch_sums,
    block_influence,
    head_scores,
    per_head,
)
from nemo_minitron.schema.pruning import Scoring

View = Callable[[Tensor], Tensor]


Sums = dict[str, Tensor]
"""Axis -> additive statistics [rows, 4, size] of the whole model, fp64; this rank's share until summed over ranks."""


def convention_of(params: Scoring) -> Convention:
    """Return the named convention; the recipe may choose to measure neurons before or after the activation function."""
    found = CONVENTIONS["modelopt" if METHODS[params.method].weighs_columns else params.convention]
    if METHODS[params.method].weighs_columns:
        return found
    return Convention(params.neuron_score or found.neuron, found.head_per_token)


def activation_scores(
    model: Model,
    shape: ModelShape,
    batches: Iterable[Batch],
    params: Scoring,
    session: Session,
) -> dict[str, Tensor]:
    """Compute width scores, and block influence if requested, in one pass; fp64, equal on every rank.

    No batch is read if neither is requested.
    hidden: summed over the outputs of all layers' norms; ffn and heads: per layer (2407.14679, section 2.2). The final
    norm is not counted.
    """
    convention, method = convention_of(params), METHODS[params.method]
    axes = [axis for axis in SCORED_WIDTH_AXES if axis.name in params.width_axes]
    lengths = (1, *params.block_lengths) if "block_influence" in params.layer_metrics else ()
    if not axes and not lengths:
        return {}
    sums = {axis.name: _zeros(axis, shape, convention, session.device) for axis in axes}
    stream = LayerStream(model, shape, lengths, session)
    taps = _Taps(convention, method, params, shape, session)
    with evaluating(model), stream.recording(), taps.attached(model, axes, sums):
        if method.needs_gradient:
            backward_batches(model, batches, session, shape.vocab_size, after=stream.close_batch)
        else:
            forward_batches(model, batches, session, lambda *_: None, after=stream.close_batch)
    for tensor in sums.values():
        session.sum(tensor)
    return {**_width_scores(axes, sums, shape, params, convention), **_influence(stream)}


def _zeros(axis: Axis, shape: ModelShape, convention: Convention, device: torch.device) -> Tensor:
    tap = _tap(axis)
    size = (tap.num_rows * shape.num_layers, NUM_SUMS, tap.size(shape, convention))
    return torch.zeros(size, dtype=torch.float64, device=device)


def _width_scores(
    axes: list[Axis], sums: Sums, shape: ModelShape, params: Scoring, convention: Convention
) -> dict[str, Tensor]:
    squared = METHODS[params.method].weighs_columns

    def by_row(tensor_R4C: Tensor) -> Tensor:
        how: Aggregation = "mean" if squared else params.batch_aggregation
        scores = torch.stack([aggregate_batch(row, how) for row in tensor_R4C]).cpu()
        return scores.sqrt() if squared else scores

    return {axis.name: _tap(axis).score(by_row(sums[axis.name]), shape, convention) for axis in axes}


def _influence(stream: LayerStream) -> dict[str, Tensor]:
    """Return block influence: `layers.block_influence`, and `blocks.block_influence.<length>` for runs."""
    return {
        f"layers.{_BI}" if length == 1 else f"blocks.{_BI}.{length}": block_influence(sums.cpu())
        for length, sums in stream.totals().items()
    }


_BI = "block_influence"


@dataclass(frozen=True)
class _Taps:
    """Hooks that read activations and accumulate their statistics."""

    convention: Convention
    method: Method
    params: Scoring
    shape: ModelShape
    session: Session

    @contextmanager
    def attached(self, model: Model, axes: list[Axis], sums: Sums) -> Iterator[None]:
        """Attach hooks to every layer of this rank, for the requested axes."""
        with ExitStack() as stack:
            for layer in layers(model):
                inside = axes_of(self.shape, layer.index)
                for axis in axes:
                    if axis in inside or not axis.per_layer:
                        tap = _tap(axis)
                        first = tap.num_rows * layer.index
                        rows = sums[axis.name][first : first + tap.num_rows]
                        stack.enter_context(tap.attach(self, layer, rows))
            yield

    def neurons(self, layer: Layer, sums_R4C: Tensor) -> Any:
        mine = self._my_part(sums_R4C[0])
        if self.convention.neuron == "after_activation":
            norms = self._column_norms(layer.mlp_output)
            return _on_input(layer.mlp_output, lambda x: self._take(x, _same, mine, norms))
        # Megatron stacks gate and up; the gate goes through the activation function.
        view = (lambda x: x.chunk(2, -1)[0]) if self.shape.gated else _same
        return _on_output(layer.mlp_input, lambda out: self._take(out[0], view, mine))

    def heads(self, layer: Layer, sums_R4C: Tensor) -> Any:
        mine, size = self._my_part(sums_R4C[0]), self.shape.kv_channels
        view = (lambda x: per_head(x, size)) if self.convention.head_per_token else _same
        norms = self._column_norms(layer.attention_output)
        return _on_input(layer.attention_output, lambda x: self._take(x, view, mine, norms))

    @contextmanager
    def norms(self, layer: Layer, sums_R4C: Tensor) -> Iterator[None]:
        attention = self._norm(layer.input_norm, layer.attention_input, sums_R4C[0])
        with attention, self._norm(layer.pre_mlp_norm, layer.mlp_input, sums_R4C[1]):
            yield

    def _norm(self, norm: nn.Module, reader: nn.Module, sums_4C: Tensor) -> Any:
        """Read a norm; without sequence parallelism tensor-parallel ranks have equal outputs: only the first counts."""
        scattered = self.session.parallel.sequence_parallel and self.session.parallel.tp > 1
        norms = self._column_norms(reader, over_ranks=True)
        if self.session.tp_rank and not scattered:
            return ExitStack()
        view = _whole_sequence if scattered else _same
        target = sums_4C if self.session.tp_rank == 0 else torch.zeros_like(sums_4C)
        return _on_output(norm, lambda x: self._take(x, view, target, norms))

    def _column_norms(self, linear: nn.Module, *, over_ranks: bool = False) -> Tensor | None:
        """Return the L2 norms of a weight's columns; None for methods that do not use them.

        Args:
            over_ranks: whether each tensor-parallel rank has other rows of the weight.
        """
        if not self.method.weighs_columns:
            return None
        weight = cast(Tensor, linear.weight).detach()
        squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(0)
        return (reduce_from_tensor_model_parallel_region(squares) if over_ranks else squares).sqrt()

    def _my_part(self, sums_4C: Tensor) -> Tensor:
        start, stop = shard_range(sums_4C.shape[-1], self.session.tp_rank, self.session.parallel.tp)
        return sums_4C[:, start:stop]

    def _take(self, activation: Tensor, view: View, target_4C: Tensor, column_norms: Tensor | None = None) -> None:
        how = "mean" if self.method.weighs_columns else self.params.sequence_aggregation

        def add(values: Tensor) -> None:
            target_4C.add_(batch_sums(aggregate_sequence(view(values), how)))

        values, kept = self.method.values, activation.detach()
        if column_norms is not None:
            kept = kept * column_norms
        if not self.method.needs_gradient:
            add(values(kept, kept))
            return
        activation.register_hook(lambda gradient: add(values(kept, gradient)))


@dataclass(frozen=True)
class _Tap:
    """How the importance of an axis is measured at one place of a layer."""

    num_rows: int
    """Number of rows of statistics for each layer."""
    size: Callable[[ModelShape, Convention], int]
    """Number of values in a row."""
    attach: Callable[[_Taps, Layer, Tensor], Any]
    """(taps, layer, its rows of the sums) -> context manager that has hooks on the layer."""
    score: Callable[[Tensor, ModelShape, Convention], Tensor]
    """Rows after aggregation over the batch -> score of the axis."""


def _attention_size(shape: ModelShape, convention: Convention) -> int:
    return shape.num_attention_heads if convention.head_per_token else shape.axis_sizes()["q"]


def _attention_score(rows: Tensor, shape: ModelShape, convention: Convention) -> Tensor:
    return rows if convention.head_per_token else head_scores(rows, shape.kv_channels)


TAPS: dict[ScoredAt, _Tap] = {
    "norm_outputs": _Tap(2, lambda shape, _: shape.hidden_size, _Taps.norms, lambda rows, *_: rows.sum(0)),
    "mlp_neurons": _Tap(1, lambda shape, _: shape.ffn_hidden_size, _Taps.neurons, lambda rows, *_: rows),
    "attention_heads": _Tap(1, _attention_size, _Taps.heads, _attention_score),
}
"""Place of an axis (`Axis.scored_at`) -> how it is measured there."""


def _tap(axis: Axis) -> _Tap:
    assert axis.scored_at is not None
    return TAPS[axis.scored_at]


def _same(x: Tensor) -> Tensor:
    return x


def _whole_sequence(x: Tensor) -> Tensor:
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)


@contextmanager
def _on_input(module: nn.Module, consume: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        # A hook that returns a value would replace the activation.
        consume(args[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _on_output(module: nn.Module, consume: Callable[[Any], None]) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, out: Any) -> None:
        consume(out)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
