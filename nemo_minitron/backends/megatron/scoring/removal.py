"""Measure a model without some of its layers.

One full pass of each batch keeps every layer's input, so that removing layers i..j computes only the layers after j.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.backends.megatron.model.forward import Batch, evaluating, token_nll
from nemo_minitron.backends.megatron.model.head import vocab_of
from nemo_minitron.backends.megatron.model.parts import Layer, Model, before_layers, layers, only
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.families import ModelShape
from nemo_minitron.families.split import stage_bounds
from nemo_minitron.pruning.depth import DepthMetric, Removal, Run
from nemo_minitron.system.progress import Progress


@dataclass(frozen=True)
class Effects:
    """Importance of each run by each metric, and the same metrics of the whole model."""

    whole: dict[str, float]
    without: dict[str, list[float]]


@torch.no_grad()
def effects_of_removal(
    model: Model,
    shape: ModelShape,
    batches: Sequence[Batch],
    runs: Sequence[Run],
    metrics: Mapping[str, DepthMetric],
    session: Session,
    progress: Progress,
    dropped: Sequence[int] = (),
) -> Effects:
    """Measure the model without each run of layers, on every batch; equal on every rank.

    Args:
        dropped: layers that are removed as well, in every measurement. Logits are still compared with those of the
            whole model.
    """
    totals = {
        name: torch.zeros(len(runs) + 1, metric.num_sums, dtype=torch.float64, device=session.device)
        for name, metric in metrics.items()
    }
    runner = _LayerRunner(model, shape, session)
    with evaluating(model), progress.bar("without layers", len(batches) * len(runs), "passes") as bar:
        for batch in batches:
            whole = runner.run(batch, None) if dropped else None
            with without_layers(model, dropped):
                with runner.recording():
                    left = runner.run(batch, None)
                whole = whole if dropped else left
                _count(totals, 0, left, whole, batch, metrics, shape, session)
                for number, run in enumerate(runs, 1):
                    logits = runner.run(batch, run)
                    _count(totals, number, logits, whole, batch, metrics, shape, session)
                    bar.advance()
    for total in totals.values():
        if not (session.is_last_stage and session.tp_rank == 0):
            total.zero_()
        session.sum(total)
    found = {name: [metrics[name].importance(row) for row in total.cpu()] for name, total in totals.items()}
    return Effects({name: rows[0] for name, rows in found.items()}, {name: rows[1:] for name, rows in found.items()})


def _count(
    totals: Mapping[str, Tensor],
    number: int,
    logits: Tensor | None,
    whole: Tensor | None,
    batch: Batch,
    metrics: Mapping[str, DepthMetric],
    shape: ModelShape,
    session: Session,
) -> None:
    """Add the metrics of one removal to the sums; on the last stage only."""
    if logits is None or whole is None:
        return
    nll = token_nll(logits, batch["labels"], shape.vocab_size)
    vocab = vocab_of(session, logits.shape[-1], shape.vocab_size)
    removal = Removal(logits, whole, nll, batch["loss_mask"], batch.get("answer"), vocab.sum)
    for name, metric in metrics.items():
        totals[name][number] += metric.sums(removal)


@dataclass
class _LayerRunner:
    """Runs some of this rank's layers and sends hidden states to the next stage."""

    model: Model
    shape: ModelShape
    session: Session
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Layer index -> input in the last recorded pass."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.inputs.clear()
        with before_layers(self.model, self.inputs.__setitem__):
            yield

    def run(self, batch: Batch, removed: Run | None) -> Tensor | None:
        """Return logits on the last stage, None on the others.

        The input of the removed run is taken from the recorded pass: stages before it do nothing.
        """
        kept = layers(self.model)
        if removed is None:
            return self._pass(batch, kept, self._received(batch))
        first, stop = stage_bounds(self.shape.num_layers, self.session.parallel.pp)[self.session.pp_rank]
        if removed.start >= stop:
            return None
        hidden = self.inputs[removed.start] if removed.start >= first else self._received(batch)
        return self._pass(batch, [layer for layer in kept if layer.index >= removed.stop], hidden)

    def _pass(self, batch: Batch, kept: Sequence[Layer], hidden: Tensor | None) -> Tensor | None:
        tokens = batch["tokens"]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with only(self.model, kept):
            if not self.session.is_first_stage:
                self.model.set_input_tensor(hidden)
            out: Tensor = self.model(tokens, positions, None, decoder_input=hidden)
        if self.session.is_last_stage:
            return out
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None

    def _received(self, batch: Batch) -> Tensor | None:
        """Receive hidden states from the previous stage; None on the first."""
        if self.session.is_first_stage:
            return None
        batch_size, length = batch["tokens"].shape
        parallel = self.session.parallel
        local = length // parallel.tp if parallel.sequence_parallel else length
        dtype = self.model.config.params_dtype
        hidden = torch.empty(local, batch_size, self.shape.hidden_size, dtype=dtype, device=self.session.device)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden


@contextmanager
def without_layers(model: Model, dropped: Sequence[int]) -> Iterator[None]:
    """Remove layers (0-based index in the whole model) inside the context."""
    with only(model, [layer for layer in layers(model) if layer.index not in dropped]):
        yield
