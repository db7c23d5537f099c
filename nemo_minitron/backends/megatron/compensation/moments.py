"""Second moments of the inputs of a teacher's linear layers, one layer of the model at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.compensation.runner import LayerRunner
from nemo_minitron.backends.megatron.compensation.sites import SITES, Site, weights_of
from nemo_minitron.backends.megatron.compensation.streams import Stream
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.compensation import require_finite_activations, summed_products
from nemo_minitron.pruning.reconstruction import Readers
from nemo_minitron.schema.pruning import LayerSite


def readers_by_layer(
    teacher: Checkpoint, runner: LayerRunner, sites: Sequence[LayerSite], streams: list[Stream], session: Session
) -> Iterator[dict[LayerSite, Readers]]:
    """Yield the moments and weights of the sites of each layer, over all processes; the streams advance.

    Raises:
        NumericsError: the activations are not finite.
    """
    chosen = [site for site in SITES if site.name in sites]
    for layer in range(teacher.shape.num_layers):
        runner.load(layer, lambda parameter: teacher.read(parameter.hf))
        grams = {site.name: _weight_gram(teacher, site, layer) for site in chosen}
        moments = {name: torch.zeros_like(gram, device=session.device) for name, gram in grams.items()}
        for stream in streams:
            found = runner.activations(stream.teacher)
            stream.teacher = found.out.cpu()
            counted = stream.counted.to(session.device)
            for site in chosen:
                inputs = found.inputs[site.name][counted]
                wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
                with summed_products(inputs.dtype):
                    moments[site.name] += wide.T @ wide
        for name, tensor in moments.items():
            require_finite_activations([session.sum(tensor)], f"{name} of layer {layer}")
        yield {name: Readers(tensor.cpu(), grams[name]) for name, tensor in moments.items()}


def _weight_gram(teacher: Checkpoint, site: Site, layer: int) -> Tensor:
    """Return W^T W of the stacked weights of a site, fp64."""
    stacked = torch.cat([teacher.read(parameter.hf) for parameter in weights_of(site, teacher.shape, layer)]).double()
    return stacked.T @ stacked
