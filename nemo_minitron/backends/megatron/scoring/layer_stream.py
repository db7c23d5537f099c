"""Record the residual stream between the layers, from which block influence is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.backends.megatron.model.parts import Model, after_layers
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.families import ModelShape
from nemo_minitron.families.split import stage_bounds
from nemo_minitron.pruning.importance import block_influence_sums


class LayerStream:
    """Sums the cosines between the inputs and outputs of runs of layers, batch by batch.

    Single layers are added as they run. For longer runs the stream of one batch is kept until its end. Pipeline stages
    then exchange their streams, because a run may begin on one stage and end on another.

    Args:
        lengths: lengths of the runs, in layers; nothing is recorded if empty.
    """

    def __init__(self, model: Model, shape: ModelShape, lengths: Sequence[int], session: Session) -> None:
        self.model, self.shape, self.session = model, shape, session
        self.sums = {
            length: torch.zeros(shape.num_layers - length + 1, 2, dtype=torch.float64, device=session.device)
            for length in dict.fromkeys(lengths)
        }
        self._stream: list[Tensor] = []
        scattered = session.parallel.sequence_parallel and session.parallel.tp > 1
        # Tensor-parallel ranks hold the same stream, or with sequence parallelism a part of the sequence each.
        self._counts = bool(self.sums) and (session.tp_rank == 0 or scattered)

    @property
    def _keeps_stream(self) -> bool:
        return any(length > 1 for length in self.sums)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the layers of this rank inside the context."""
        if not self._counts:
            yield
            return
        with after_layers(self.model, self._after_layer):
            yield

    def _after_layer(self, index: int, given: Tensor, out: Tensor) -> None:
        before, after = given.detach(), out.detach()
        if 1 in self.sums:
            self.sums[1][index] += block_influence_sums(before, after)
        if self._keeps_stream:
            self._stream = [*self._stream, after] if self._stream else [before, after]

    def close_batch(self) -> None:
        """Add the runs of the batch that has just been processed."""
        if not (self._counts and self._keeps_stream):
            return
        stream, self._stream = self._whole_stream(), []
        if not self.session.is_last_stage:
            return
        for length, sums in self.sums.items():
            for start in range(len(sums)) if length > 1 else ():
                sums[start] += block_influence_sums(stream[start], stream[start + length])

    def _whole_stream(self) -> list[Tensor]:
        """Return the input of every layer and the output of the last one, on every stage."""
        if self.session.parallel.pp == 1:
            return self._stream
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = dist.get_process_group_ranks(group)
        whole: list[Tensor] = []
        for stage, (start, stop) in enumerate(stage_bounds(self.shape.num_layers, self.session.parallel.pp)):
            if stage == self.session.pp_rank:
                part = torch.stack(self._stream)
            else:
                part = self._stream[0].new_empty(stop - start + 1, *self._stream[0].shape)
            dist.broadcast(part, ranks[stage], group=group)
            # The first tensor of a stage is the last of the stage before it.
            whole += list(part[1:] if whole else part)
        return whole

    def totals(self) -> dict[int, Tensor]:
        """Return length -> [runs, 2], summed over all ranks."""
        return {length: self.session.sum(sums) for length, sums in self.sums.items()}
