"""Rank hidden channels, neurons and heads by the error that is left after a repair."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nemo_minitron.stages.artifacts import Model, Scores, TokenizedText
from nemo_minitron.stages.common.layer_files import LayerFiles
from nemo_minitron.stages.common.one_tokenizer import require_tokenizer_of
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.score_reconstruction.params import ScoreReconstructionStage

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.families import ModelShape
    from nemo_minitron.families.axes import Axis
    from nemo_minitron.pruning.reconstruction import Readers
    from nemo_minitron.schema.pruning import LayerSite

    Found = dict[LayerSite, Readers]


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    data: TokenizedText


def score_reconstruction(params: ScoreReconstructionStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write scores.safetensors with the rank of each index: the higher, the later it would be cut.

    After a kill, layers that have been ranked are not ranked again. Hidden channels are ranked for all layers at once,
    on rank 0: that takes 32 bytes x layers x hidden size^2 of its memory, 17 GB for a model of Llama 3.1 8B's shape.

    Raises:
        DataError: the text was made with another tokenizer than the model's.
        Interrupted: a stop was requested.
        NumericsError: activations are not finite.
    """
    from nemo_minitron.backends.megatron.compensation.moments import readers_by_layer
    from nemo_minitron.backends.megatron.compensation.runner import LayerRunner
    from nemo_minitron.backends.megatron.compensation.streams import calibration_batches, embedded
    from nemo_minitron.backends.megatron.model.build import DTYPES
    from nemo_minitron.hf.checkpoint import Checkpoint

    require_tokenizer_of(inputs.model, inputs.data, ctx)
    teacher, session = Checkpoint.open(inputs.model.path), ctx.open_session
    batches = calibration_batches(
        inputs.data.path,
        session,
        num_samples=params.num_samples,
        seq_len_tokens=params.seq_len_tokens,
        seed=params.seed,
        cache_dir=ctx.work_dir / "data_index",
    )
    streams = embedded(batches, teacher.embeddings(), None, DTYPES[params.precision])
    runner = LayerRunner(teacher.shape, session, params.precision, params.seq_len_tokens)
    layers = readers_by_layer(teacher, runner, _sites(params), streams, session)
    total = teacher.shape.num_layers
    ranked = _Ranking(params, teacher.shape, LayerFiles(ctx.work_dir / "layers"))
    for number, found in enumerate(ctx.progress.track(layers, "score_reconstruction", total, "layers")):
        with session.main_works():
            if ctx.is_main:
                ranked.add(number, found)
        ctx.check_stop()
    facts = {"num_samples": params.num_samples, "seq_len_tokens": params.seq_len_tokens}
    scores: dict[str, Tensor] = {}
    with session.main_works():
        if ctx.is_main:
            scores = ranked.scores()
            Scores.save(scores, ctx.out_dir)
            (ctx.out_dir / "scores.json").write_text(json.dumps(facts, indent=2) + "\n")
    return {**facts, "scores": sorted(scores)} if ctx.is_main else facts


_SITES_OF_AXIS: dict[str, tuple[LayerSite, ...]] = {
    "hidden": ("attention_input", "mlp_input"),
    "ffn": ("mlp_output",),
    "heads": ("attention_output",),
}


def _sites(params: ScoreReconstructionStage) -> list[LayerSite]:
    return [site for axis in params.width_axes for site in _SITES_OF_AXIS[axis]]


@dataclass(frozen=True)
class _Ranking:
    """Ranks of the layers so far, one file each in the work folder."""

    params: ScoreReconstructionStage
    shape: ModelShape
    files: LayerFiles

    def add(self, number: int, found: Found) -> None:
        """Rank the axes inside a layer, and keep the moments of the inputs that hidden channels feed."""
        if number in self.files:
            return
        out: dict[str, Tensor] = {}
        for axis in self._axes():
            readers = [found[site] for site in _SITES_OF_AXIS[axis.name]]
            if axis.per_layer:
                out[axis.name] = self._ranks(axis, partial(iter, readers))
            else:
                for place, some in enumerate(readers):
                    out |= {f"moments.{place}": some.moments, f"weight_gram.{place}": some.weight_gram}
        self.files.save(number, out)

    def scores(self) -> dict[str, Tensor]:
        """Return axis -> ranks: [layers, size], or [size] for an axis that is chosen once for all layers."""
        import torch

        layers = range(self.shape.num_layers)
        return {
            axis.name: torch.stack([self.files.read(layer, axis.name) for layer in layers])
            if axis.per_layer
            else self._ranks(axis, partial(self._saved, axis))
            for axis in self._axes()
        }

    def _saved(self, axis: Axis) -> Iterator[Readers]:
        """Read what an axis feeds, of all layers, one after the other."""
        from nemo_minitron.pruning.reconstruction import Readers

        for layer in range(self.shape.num_layers):
            for place in range(len(_SITES_OF_AXIS[axis.name])):
                read = (self.files.read(layer, f"{name}.{place}") for name in ("moments", "weight_gram"))
                yield Readers(*read)

    def _axes(self) -> list[Axis]:
        from nemo_minitron.families.axes import SCORED_WIDTH_AXES

        return [axis for axis in SCORED_WIDTH_AXES if axis.name in self.params.width_axes]

    def _ranks(self, axis: Axis, readers: Callable[[], Iterator[Readers]]) -> Tensor:
        """Return the rank of each index, fp64; the indices that swapping keeps rank above all others."""
        import torch

        from nemo_minitron.pruning.reconstruction import best_in_groups, greedy_order, obs_order, swapped

        block = 1 if axis.unit is None else int(getattr(self.shape, axis.unit))
        rank = obs_order if self.params.method == "obs" else greedy_order
        order = rank(readers(), block=block, step=self.params.step if axis.unit is None else 1)
        groups = self._groups(axis)
        size = self._kept(axis, groups)
        if size is not None and size < len(order):
            first = best_in_groups(order, size, groups)
            kept = set(swapped(readers(), first, rounds=self.params.swap_rounds, block=block, groups=groups))
            order = [*(index for index in order if index in kept), *(index for index in order if index not in kept)]
        ranks = torch.empty(len(order), dtype=torch.float64)
        ranks[torch.tensor(order)] = torch.arange(len(order), 0, -1, dtype=torch.float64)
        return ranks

    def _groups(self, axis: Axis) -> int:
        """Return the number of query groups, each of which keeps as many heads; 1 for other axes."""
        return self.shape.num_query_groups if axis.name == "heads" and self.shape.heads_per_group > 1 else 1

    def _kept(self, axis: Axis, groups: int) -> int | None:
        """Return how many indices stay while no group goes; None: swap_to does not name the axis."""
        size: int | None = getattr(self.params.swap_to, axis.target_key)
        if size is None or groups == 1:
            return size
        return size // (self.params.swap_to.num_query_groups or groups) * groups
