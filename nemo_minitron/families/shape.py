"""The sizes and switches of a decoder-only transformer, independent of any framework."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Norm = Literal["rmsnorm", "layernorm1p"]
Activation = Literal["swiglu", "squared_relu"]


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency scaling; the three other constants of it are fixed (1, 4, 8192)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that decides the parameters and the arithmetic of one model.

    `kv_channels` is the size of one head. It is explicit because a width-pruned model
    has heads whose sizes no longer add up to `hidden_size`.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    norm: Norm
    norm_eps: float
    activation: Activation
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rotary_fraction: float
    rope_scaling: Llama3RopeScaling | None
    sliding_window_tokens: int | None

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    def sizes(self) -> dict[str, int]:
        """The sizes that pruning can change, and what they are counted in."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
        }

    def axis_sizes(self) -> dict[str, int]:
        """Length of each axis label that a parameter row may carry."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "q": self.num_attention_heads * self.kv_channels,
            "kv": self.num_query_groups * self.kv_channels,
            "head_dim": self.kv_channels,
        }

    def resized(self, **sizes: int) -> ModelShape:
        """A copy with other sizes; `kv_channels` stays unless given."""
        return replace(self, **sizes)  # type: ignore[arg-type]


class Sizes(Protocol):
    """Sizes that a student is to have; None keeps the source's."""

    @property
    def num_layers(self) -> int | None: ...
    @property
    def hidden_size(self) -> int | None: ...
    @property
    def ffn_hidden_size(self) -> int | None: ...
    @property
    def num_attention_heads(self) -> int | None: ...
    @property
    def num_query_groups(self) -> int | None: ...


def target_shape(source: ModelShape, target: Sizes, drop_layers: Collection[int] | None) -> ModelShape:
    """What is left of `source`. Where every head is its own query group, the groups go with the heads."""
    heads = target.num_attention_heads or source.num_attention_heads
    groups = target.num_query_groups or (heads if source.heads_per_group == 1 else source.num_query_groups)
    if target.num_attention_heads is None and target.num_query_groups is not None:
        heads = groups * source.heads_per_group
    dropped = 0 if drop_layers is None else len(set(drop_layers))
    return source.resized(
        num_layers=target.num_layers or source.num_layers - dropped,
        hidden_size=target.hidden_size or source.hidden_size,
        ffn_hidden_size=target.ffn_hidden_size or source.ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
    )
