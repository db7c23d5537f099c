"""The places of a layer whose linear layers can be repaired: their parameters and inputs."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.families import ModelShape, Parameter, Row
from nemo_minitron.families.axes import HIDDEN
from nemo_minitron.families.blocks import ATTENTION, MLP, Block
from nemo_minitron.families.registry import layers_of
from nemo_minitron.schema.pruning import LayerSite


@dataclass(frozen=True)
class Site:
    """Linear layers that share one input."""

    name: LayerSite
    block: Block
    reads_stream: bool
    """Whether the layers read the normalized residual stream; otherwise they write to the stream."""

    def has(self, row: Row) -> bool:
        """Return whether a row of the axis table is one of their weight matrices."""
        return len(row.axes) == 2 and row.axes[1 if self.reads_stream else 0] in HIDDEN.coupled


SITES = (
    Site("attention_input", ATTENTION, True),
    Site("attention_output", ATTENTION, False),
    Site("mlp_input", MLP, True),
    Site("mlp_output", MLP, False),
)
"""All sites of a layer, in the order in which they run."""


def weights_of(site: Site, shape: ModelShape, layer: int) -> list[Parameter]:
    """Return the weight matrices of a site in one layer; empty if the layer does not have its block."""
    blocks = [block for block in layers_of(shape)[layer] if block is site.block]
    return [Parameter(row, layer) for block in blocks for row in block.rows(shape) if site.has(row)]


def biases_of(site: Site, shape: ModelShape, layer: int) -> list[Parameter]:
    """Return the biases of a site in one layer, in the order of its weights; empty if they have none."""
    names = {parameter.row.hf.removesuffix("weight") + "bias" for parameter in weights_of(site, shape, layer)}
    rows = (row for block in layers_of(shape)[layer] if block is site.block for row in block.rows(shape))
    return [Parameter(row, layer) for row in rows if row.hf in names]


def input_label(site: Site, shape: ModelShape) -> str:
    """Return the label of the site's input dimension in the axis table."""
    return weights_of(site, shape, 0)[0].row.axes[1]
