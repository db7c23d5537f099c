"""The supported model families. A new family is a module and one line here."""

from __future__ import annotations

from nemo_minitron.families import llama, mistral, nemotron, qwen2, qwen3
from nemo_minitron.families.axes import WIDTH_AXES, Axis
from nemo_minitron.families.blocks import Layer
from nemo_minitron.families.family import Family
from nemo_minitron.families.shape import ModelShape

FAMILIES: dict[str, Family] = {
    family.name: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, nemotron.FAMILY)
}


def family_of(shape: ModelShape) -> Family:
    """Return the family of a model."""
    return FAMILIES[shape.family]


def layers_of(shape: ModelShape) -> tuple[Layer, ...]:
    """Return the blocks of each layer of a model."""
    return family_of(shape).layers(shape)


def axes_of(shape: ModelShape, layer: int) -> tuple[Axis, ...]:
    """Return the axes inside one layer that can be cut; an axis that holds another comes before it."""
    inside = {axis for block in layers_of(shape)[layer] for axis in block.axes}
    return tuple(axis for axis in WIDTH_AXES if axis in inside)


def width_axes(shape: ModelShape) -> tuple[Axis, ...]:
    """Return the axes of a model that can be cut, except for its layers."""
    inside = {axis for layer in set(layers_of(shape)) for block in layer for axis in block.axes}
    return tuple(axis for axis in WIDTH_AXES if axis in inside or not axis.per_layer)
