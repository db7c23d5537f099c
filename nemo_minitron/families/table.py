"""The axis table: one row for each parameter of a model. No torch.

What is cut from one axis is cut from each parameter that carries one of its labels. Counting, slicing, loading and
saving all read this table; a layer's parameters are listed in `families/blocks.py` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import MappingProxyType

from nemo_minitron.families.blocks import EXPERT, LAYER, Layer, Row, norm_rows
from nemo_minitron.families.registry import layers_of
from nemo_minitron.families.shape import ModelShape

Places = tuple[int | None, ...]
"""Layers that have a row; (None,) for a row outside the layers."""


@dataclass(frozen=True)
class Parameter:
    """A row at a given layer and expert: one tensor."""

    row: Row
    layer: int | None
    expert: int | None = None

    @property
    def hf(self) -> str:
        return self._at(self.row.hf)

    @property
    def megatron(self) -> str:
        return self._at(self.row.megatron)

    def _at(self, name: str) -> str:
        return name.replace(LAYER, str(self.layer)).replace(EXPERT, str(self.expert))


@lru_cache(maxsize=64)
def placed_rows(shape: ModelShape) -> Mapping[Row, Places]:
    """Return each row of a model, in the order of the network, with the layers that have it."""
    head = () if shape.tied_embeddings else (Row("lm_head.weight", ("vocab", "hidden"), "output_layer.weight"),)
    table: dict[Row, Places] = {
        Row("model.embed_tokens.weight", ("vocab", "hidden"), "embedding.word_embeddings.weight"): (None,),
        **_layer_rows(shape),
        **dict.fromkeys((*norm_rows(shape, "model.norm", "decoder.final_layernorm"), *head), (None,)),
    }
    return MappingProxyType(table)


def _layer_rows(shape: ModelShape) -> dict[Row, Places]:
    kinds: dict[Layer, list[int]] = {}
    for number, layer in enumerate(layers_of(shape)):
        kinds.setdefault(layer, []).append(number)
    places: dict[Row, list[int]] = {}
    for layer, numbers in kinds.items():
        for block in layer:
            for row in block.rows(shape):
                places.setdefault(row, []).extend(numbers)
    return {row: tuple(sorted(numbers)) for row, numbers in places.items()}


def rows(shape: ModelShape) -> tuple[Row, ...]:
    """Return each row of a model, in the order of the network."""
    return tuple(placed_rows(shape))


def parameters(shape: ModelShape) -> Iterator[Parameter]:
    """Yield each tensor of a model: all layers and experts of one row after those of the row before it."""
    for row, places in placed_rows(shape).items():
        for layer in places:
            for expert in row.experts:
                yield Parameter(row, layer, expert)


def tensor_shape(shape: ModelShape, row: Row) -> tuple[int, ...]:
    """Return the dimensions of a parameter in its Hugging Face checkpoint."""
    sizes = shape.axis_sizes()
    return tuple(sizes[axis] for axis in row.axes)


def num_params(shape: ModelShape, *, embeddings: bool = True) -> int:
    """Return the exact number of parameters; tied embeddings count once.

    Args:
        embeddings: False leaves out all parameters with a vocab dimension ("non-embedding" parameters).
    """
    sizes = shape.axis_sizes()
    return sum(
        prod(sizes[axis] for axis in row.axes) * len(places) * len(row.experts)
        for row, places in placed_rows(shape).items()
        if embeddings or "vocab" not in row.axes
    )
