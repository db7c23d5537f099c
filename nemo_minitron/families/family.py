"""The record that each model family fills in. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from nemo_minitron.families.blocks import Layer, dense_layers
from nemo_minitron.families.shape import Activation, ModelShape, Norm

SWIGLU_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"hidden_act": "silu", "rms_norm_eps": 1e-6, "partial_rotary_factor": 1.0}
)
"""What the config classes of Llama and its relatives in transformers fill in."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the config.json of a family is read, and what its layers are made of."""

    name: str
    """`model_type` in config.json."""
    architecture: str
    """Entry of `architectures` in config.json."""
    defaults: Mapping[str, Any]
    """What the config class in transformers fills in for a key that config.json lacks. The sizes must be there."""
    must_be_off: tuple[str, ...] = ()
    """Switches of the family's code in transformers for parameters that have no rows here."""
    norm: Norm = "rmsnorm"
    norm_eps_key: str = "rms_norm_eps"
    activation: Activation = "swiglu"
    qkv_bias: bool = False
    qk_norm: bool = False
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` may be below 1."""
    llama3_rope: bool = True
    """Whether the code in transformers knows the rope scaling of Llama 3.1."""
    sliding_window: Literal["ignored", "every_layer", "some_layers"] = "ignored"
    """Layers that `sliding_window` applies to in transformers. Models with a window in some layers are refused."""
    uneven_heads_as: str | None = None
    """Family to write instead if the hidden size is not a multiple of the heads; None: transformers accepts it."""
    layers: Callable[[ModelShape], tuple[Layer, ...]] = dense_layers
    """Blocks of each layer of a model."""
