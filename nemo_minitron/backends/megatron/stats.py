"""Importance statistics from forward hooks on a Megatron model.

Every rank adds up what it sees of its own layers and channels into zero tensors of the whole
model's size; one sum over all ranks then gives every rank the whole statistic, in any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from nemo_minitron.backends.megatron.datasets import HeldOutBatches
from nemo_minitron.backends.megatron.evaluate import sum_nll
from nemo_minitron.backends.megatron.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.layout import shard_range
from nemo_minitron.backends.megatron.session import Session
from nemo_minitron.config.schema import ScoreStage
from nemo_minitron.families import ModelShape
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.importance import (
    NUM_SUMS,
    aggregate_batch,
    aggregate_sequence,
    batch_sums,
    block_influence,
    block_influence_sums,
    head_scores,
)


@dataclass(frozen=True)
class Sums:
    """Additive statistics of the whole model, fp64; this rank's share until they are summed."""

    norms: Tensor
    """[2L, 4, hidden]: outputs of each layer's two norms."""
    ffn: Tensor
    """[L, 4, ffn]: input of the second MLP matrix."""
    attention: Tensor
    """[L, 4, heads * kv_channels]: input of the attention output projection."""
    blocks: Tensor
    """[L, 2]: cosine between each layer's input and output, and tokens."""

    @classmethod
    def zeros(cls, shape: ModelShape, device: torch.device) -> Sums:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        layers, axis = shape.num_layers, shape.axis_sizes()
        return cls(
            norms=zeros(2 * layers, NUM_SUMS, axis["hidden"]),
            ffn=zeros(layers, NUM_SUMS, axis["ffn"]),
            attention=zeros(layers, NUM_SUMS, axis["q"]),
            blocks=zeros(layers, 2),
        )


def activation_scores(
    model: GPTModel,
    shape: ModelShape,
    batches: Iterable[Batch],
    params: ScoreStage,
    session: Session,
) -> dict[str, Tensor]:
    """Scores of every axis from forward passes only, fp32, equal on every rank.

    hidden: summed over the outputs of all layers' norms; ffn and heads: per layer (2407.14679,
    section 2.2). The final norm is not counted.
    """
    sums = Sums.zeros(shape, session.device)
    with evaluating(model), _hooks(model, shape, sums, params, session):
        forward_batches(model, batches, session, lambda *_: None)
    for tensor in (sums.norms, sums.ffn, sums.attention, sums.blocks):
        session.sum(tensor)
    return {name: score.float().cpu() for name, score in _finish(sums, shape, params).items()}


def _finish(sums: Sums, shape: ModelShape, params: ScoreStage) -> dict[str, Tensor]:
    def by_row(tensor_R4C: Tensor) -> Tensor:
        return torch.stack([aggregate_batch(row, params.batch_aggregation) for row in tensor_R4C])

    scores: dict[str, Callable[[], Tensor]] = {
        "hidden": lambda: by_row(sums.norms).sum(0),
        "ffn": lambda: by_row(sums.ffn),
        "heads": lambda: head_scores(by_row(sums.attention), shape.kv_channels),
    }
    out: dict[str, Tensor] = {axis: scores[axis]() for axis in params.width_axes}
    if "block_influence" in params.layer_metrics:
        out["layers.block_influence"] = block_influence(sums.blocks)
    return out


@contextmanager
def _hooks(model: GPTModel, shape: ModelShape, sums: Sums, params: ScoreStage, session: Session) -> Iterator[None]:
    tp, tp_rank = session.parallel.tp, session.tp_rank
    ffn_part = slice(*shard_range(shape.axis_sizes()["ffn"], tp_rank, tp))
    attention_part = slice(*shard_range(shape.axis_sizes()["q"], tp_rank, tp))

    def collect(target_4C: Tensor) -> Callable[[Tensor], None]:
        # Returns None: a value would replace the activation.
        def add(activations: Tensor) -> None:
            target_4C.add_(batch_sums(aggregate_sequence(activations, params.sequence_aggregation)))

        return add

    with ExitStack() as stack:
        for layer in model.decoder.layers:
            index = layer.layer_number - 1
            stack.enter_context(_on_input(layer.mlp.linear_fc2, collect(sums.ffn[index, :, ffn_part])))
            stack.enter_context(
                _on_input(layer.self_attention.linear_proj, collect(sums.attention[index, :, attention_part]))
            )
            if tp_rank == 0:  # what follows is the same on every tensor-parallel rank
                stack.enter_context(_on_output(layer.input_layernorm, collect(sums.norms[2 * index])))
                stack.enter_context(_on_output(layer.pre_mlp_layernorm, collect(sums.norms[2 * index + 1])))
                stack.enter_context(_on_both(layer, sums.blocks[index]))
        yield


@contextmanager
def _on_input(module: nn.Module, consume: Callable[[Tensor], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args: consume(args[0].detach()))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _on_output(module: nn.Module, consume: Callable[[Tensor], None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, args, out: consume(out.detach()))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _on_both(layer: nn.Module, target: Tensor) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        target.add_(block_influence_sums(before.detach(), out[0].detach()))

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def loss_without_layers(
    model: GPTModel, shape: ModelShape, heldout: HeldOutBatches, session: Session, progress: Progress
) -> tuple[Tensor, float]:
    """(LM loss [L] after removing each layer, loss of the whole model), nats per token.

    The paper's PPL importance of a layer (2407.14679, section 2.2): the higher the loss, the more it matters.
    """
    silent = Progress(silent=True)
    baseline = sum_nll(model, heldout, shape.vocab_size, session, silent).loss
    losses = []
    with progress.bar("loss without each layer", shape.num_layers, "layers") as bar:
        for layer in range(shape.num_layers):
            with _without(model, layer):
                losses.append(sum_nll(model, heldout, shape.vocab_size, session, silent).loss)
            bar.advance(loss=losses[-1])
    return torch.tensor(losses), baseline


@contextmanager
def _without(model: GPTModel, index: int) -> Iterator[None]:
    """Let one layer hand its input through; nothing happens on ranks that do not hold it."""
    layer = next((layer for layer in model.decoder.layers if layer.layer_number - 1 == index), None)
    if layer is None:
        yield
        return

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], *out[1:])

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
