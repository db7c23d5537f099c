"""Blocks: the parts that a layer is made of, each with the rows of its parameters. No torch.

A row names a parameter in its Hugging Face checkpoint, labels its dimensions (`families/axes.py`), and states where the
parameter is in Megatron-Core. A layer is a tuple of blocks, and the layers of a model may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from nemo_minitron.families.axes import FFN, GROUPS, HEADS, Axis
from nemo_minitron.families.shape import ModelShape

Part = Literal["q", "k", "v", "gate", "up"]
LAYER = "{layer}"
EXPERT = "{expert}"


@dataclass(frozen=True)
class Row:
    """One parameter: of each layer that has it if the names contain `{layer}`, of each expert if `{expert}`."""

    hf: str
    axes: tuple[str, ...]
    """Label of each dimension."""
    megatron: str
    part: Part | None = None
    """Part of a fused Megatron tensor; None: the whole tensor."""
    num_experts: int | None = None
    """Number of experts with a parameter of their own; None: the row is not indexed by expert."""

    @property
    def per_layer(self) -> bool:
        return LAYER in self.hf

    @property
    def experts(self) -> tuple[int | None, ...]:
        """Indices of the experts that have this parameter; (None,) without experts."""
        return (None,) if self.num_experts is None else tuple(range(self.num_experts))


@dataclass(frozen=True, eq=False)
class Block:
    """One part of a layer, with the norm before it. Compared by identity, which is fast."""

    name: str
    axes: tuple[Axis, ...]
    """Axes inside the block. The hidden axis runs through all blocks."""
    rows: Callable[[ModelShape], tuple[Row, ...]]
    """All parameters of the block, in the order of the network."""
    token_mixing_flops: Callable[[ModelShape, int], float]
    """(shape, length of a sequence) -> operations per token of the products that have no weights, in a forward pass."""


Layer = tuple[Block, ...]
"""Blocks of one layer, in the order in which they run."""


def norm_rows(shape: ModelShape, hf: str, megatron: str) -> Iterator[Row]:
    """Yield the parameters of one norm."""
    yield Row(f"{hf}.weight", ("hidden",), f"{megatron}.weight")
    if shape.norm == "layernorm1p":
        yield Row(f"{hf}.bias", ("hidden",), f"{megatron}.bias")


def _attention_rows(shape: ModelShape) -> tuple[Row, ...]:
    def attention() -> Iterator[Row]:
        hf, megatron = "model.layers.{layer}.self_attn", "decoder.layers.{layer}.self_attention"
        parts: tuple[tuple[Part, str], ...] = (("q", "q"), ("k", "kv"), ("v", "kv"))
        for part, axis in parts:
            yield Row(f"{hf}.{part}_proj.weight", (axis, "hidden"), f"{megatron}.linear_qkv.weight", part)
            if shape.qkv_bias:
                yield Row(f"{hf}.{part}_proj.bias", (axis,), f"{megatron}.linear_qkv.bias", part)
        if shape.qk_norm:
            yield Row(f"{hf}.q_norm.weight", ("head_dim",), f"{megatron}.q_layernorm.weight")
            yield Row(f"{hf}.k_norm.weight", ("head_dim",), f"{megatron}.k_layernorm.weight")
        yield Row(f"{hf}.o_proj.weight", ("hidden", "q"), f"{megatron}.linear_proj.weight")

    norm = norm_rows(shape, "model.layers.{layer}.input_layernorm", "decoder.layers.{layer}.input_layernorm")
    return (*norm, *attention())


def _attention_flops(shape: ModelShape, seq_len_tokens: int) -> float:
    """Scores and weighted values of causal attention, in which a token sees half of the sequence on average."""
    return 2.0 * 2 * shape.num_attention_heads * shape.kv_channels * seq_len_tokens / 2


def _mlp_rows(shape: ModelShape) -> tuple[Row, ...]:
    def mlp() -> Iterator[Row]:
        hf, megatron = "model.layers.{layer}.mlp", "decoder.layers.{layer}.mlp"
        if shape.gated:
            yield Row(f"{hf}.gate_proj.weight", ("ffn", "hidden"), f"{megatron}.linear_fc1.weight", "gate")
            yield Row(f"{hf}.up_proj.weight", ("ffn", "hidden"), f"{megatron}.linear_fc1.weight", "up")
        else:
            yield Row(f"{hf}.up_proj.weight", ("ffn", "hidden"), f"{megatron}.linear_fc1.weight")
        yield Row(f"{hf}.down_proj.weight", ("hidden", "ffn"), f"{megatron}.linear_fc2.weight")

    norm = norm_rows(shape, "model.layers.{layer}.post_attention_layernorm", "decoder.layers.{layer}.pre_mlp_layernorm")
    return (*norm, *mlp())


def _no_flops(shape: ModelShape, seq_len_tokens: int) -> float:
    return 0.0


ATTENTION = Block("attention", (GROUPS, HEADS), _attention_rows, _attention_flops)
MLP = Block("mlp", (FFN,), _mlp_rows, _no_flops)


def dense_layers(shape: ModelShape) -> tuple[Layer, ...]:
    """Return the layers of a model that has the same attention and MLP everywhere."""
    return ((ATTENTION, MLP),) * shape.num_layers
