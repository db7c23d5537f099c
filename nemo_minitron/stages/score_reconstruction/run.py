"""Rank hidden channels, neurons and heads by the error that is left after a repair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_minitron.stages.artifacts import Model, Scores, TokenizedText
from nemo_minitron.stages.common.layer_files import LayerFiles
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

    After a kill, layers that have been ranked are not ranked again.
    """
    from nemo_minitron.backends.megatron.compensation.moments import readers_by_layer
    from nemo_minitron.backends.megatron.compensation.runner import LayerRunner
    from nemo_minitron.backends.megatron.compensation.streams import calibration_batches, embedded
    from nemo_minitron.backends.megatron.model.build import DTYPES
    from nemo_minitron.hf.checkpoint import Checkpoint

    teacher, session = Checkpoint.open(inputs.model.path), ctx.open_session
    batches = calibration_batches(
        inputs.data.path,
        session,
        num_samples=params.num_samples,
        seq_len_tokens=params.seq_len_tokens,
        seed=params.seed,
        cache_dir=ctx.work_dir / "data_index",
    )
    embeddings = teacher.embeddings()
    streams = embedded(batches, embeddings, embeddings, DTYPES[params.precision])
    runner = LayerRunner(teacher.shape, session, params.precision, params.seq_len_tokens)
    layers = readers_by_layer(teacher, runner, _sites(params), streams, session)
    total = teacher.shape.num_layers
    ranked = _Ranking(params, teacher.shape, LayerFiles(ctx.work_dir / "layers"))
    for number, found in enumerate(ctx.progress.track(layers, "score_reconstruction", total, "layers")):
        if ctx.is_main:
            ranked.add(number, found)
    facts = {"num_samples": params.num_samples, "seq_len_tokens": params.seq_len_tokens}
    if not ctx.is_main:
        return facts
    scores = ranked.scores()
    Scores.save(scores, ctx.out_dir)
    (ctx.out_dir / "scores.json").write_text(json.dumps(facts, indent=2) + "\n")
    return {**facts, "scores": sorted(scores)}


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
                out[axis.name] = self._ranks(axis, readers)
            else:
                for place, some in enumerate(readers):
                    out |= {f"moments.{place}": some.moments, f"weight_gram.{place}": some.weight_gram}
        self.files.save(number, out)

    def scores(self) -> dict[str, Tensor]:
        """Return axis -> ranks: [layers, size], or [size] for an axis that is chosen once for all layers."""
        import torch

        from nemo_minitron.pruning.reconstruction import Readers

        layers = [self.files[number] for number in range(self.shape.num_layers)]
        out = {
            axis.name: torch.stack([layer[axis.name] for layer in layers]) for axis in self._axes() if axis.per_layer
        }
        for axis in (axis for axis in self._axes() if not axis.per_layer):
            places = range(len(_SITES_OF_AXIS[axis.name]))
            readers = [Readers(layer[f"moments.{n}"], layer[f"weight_gram.{n}"]) for layer in layers for n in places]
            out[axis.name] = self._ranks(axis, readers)
        return out

    def _axes(self) -> list[Axis]:
        from nemo_minitron.families.axes import SCORED_WIDTH_AXES

        return [axis for axis in SCORED_WIDTH_AXES if axis.name in self.params.width_axes]

    def _ranks(self, axis: Axis, readers: Sequence[Readers]) -> Tensor:
        """Return the rank of each index, fp64; the indices that swapping keeps rank above all others."""
        import torch

        from nemo_minitron.pruning.reconstruction import greedy_order, obs_order, swapped

        block = 1 if axis.unit is None else int(getattr(self.shape, axis.unit))
        rank = obs_order if self.params.method == "obs" else greedy_order
        order = rank(readers, block=block, step=self.params.step if axis.unit is None else 1)
        size = getattr(self.params.swap_to, axis.target_key)
        if size is not None and size < len(order):
            kept = swapped(readers, order[:size], rounds=self.params.swap_rounds, block=block)
            order = [*kept, *(index for index in order if index not in set(kept))]
        ranks = torch.empty(len(order), dtype=torch.float64)
        ranks[torch.tensor(order)] = torch.arange(len(order), 0, -1, dtype=torch.float64)
        return ranks
