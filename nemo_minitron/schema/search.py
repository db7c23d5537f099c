"""Keys of a search's grid, constraints and rungs."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from nemo_minitron.schema.base import Fraction, Schema


class SearchGrid(Schema):
    """Sizes to try. Every combination is a point; a size that is left out stays as in the teacher."""

    num_layers: tuple[PositiveInt, ...] = ()
    """Numbers of layers."""
    hidden_size: tuple[PositiveInt, ...] = ()
    """Widths of the residual stream."""
    ffn_hidden_size: tuple[PositiveInt, ...] = ()
    """Numbers of MLP neurons."""
    ffn_expansion: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    """Numbers of MLP neurons as multiples of the hidden size, instead of ffn_hidden_size."""
    num_attention_heads: tuple[PositiveInt, ...] = ()
    """Numbers of query heads."""
    num_query_groups: tuple[PositiveInt, ...] = ()
    """Numbers of key-value heads."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> SearchGrid:
        if self.ffn_hidden_size and self.ffn_expansion:
            raise ValueError("give ffn_hidden_size or ffn_expansion, not both")
        return self

    @model_validator(mode="after")
    def _no_size_twice(self) -> SearchGrid:
        for name, sizes in self:
            twice = sorted({size for size in sizes if sizes.count(size) > 1})
            if twice:
                raise ValueError(f"{name} has {twice[0]:g} twice; each point of the grid is trained once")
        return self


class Hardware(Schema):
    """What the modeled time of a token assumes. The defaults are those of an H100 SXM's data sheet, dense 16-bit."""

    memory_gb_per_s: Annotated[float, Field(gt=0.0)] = 3350.0
    """Memory bandwidth in GB/s."""
    tflops: Annotated[float, Field(gt=0.0)] = 989.0
    """Peak TFLOP/s."""
    layer_overhead_us: Annotated[float, Field(ge=0.0)] = 10.0
    """Fixed cost of one layer in a decoding step (kernel launches), in microseconds; an assumption, not a measurement.
    """


class SearchConstraints(Schema):
    """Limits that every candidate must meet. null: no limit."""

    num_params: Annotated[float, Field(gt=0.0)] | None = None
    """Target number of parameters."""
    num_params_tolerance: Fraction = 0.05
    """Largest distance from num_params, as a fraction of it."""
    num_params_min: Annotated[float, Field(gt=0.0)] | None = None
    """Smallest number of parameters."""
    num_params_max: Annotated[float, Field(gt=0.0)] | None = None
    """Largest number of parameters."""
    context_tokens: PositiveInt = 4096
    """Tokens of each sequence in the KV cache, for memory and time."""
    batch_size: PositiveInt = 1
    """Sequences that are generated at the same time."""
    max_memory_gib: Annotated[float, Field(gt=0.0)] | None = None
    """Largest size of 16-bit weights and KV cache together."""
    max_decode_ms: Annotated[float, Field(gt=0.0)] | None = None
    """Longest modeled time to generate one token for every sequence."""
    min_generate_tokens_per_s: Annotated[float, Field(gt=0.0)] | None = None
    """Lowest generation speed, measured on this machine right after pruning; slower candidates are not trained. Needs
    `measure_speed`."""
    hardware: Hardware = Hardware()
    """What the modeled time assumes."""
    max_candidates: PositiveInt = 64
    """More candidates than this are an error, because each one is trained."""

    @property
    def num_params_range(self) -> tuple[float, float]:
        """The tightest bound that follows from the keys."""
        aim, share = self.num_params, self.num_params_tolerance
        least = [self.num_params_min or 0.0, *([aim * (1 - share)] if aim else [])]
        most = [self.num_params_max or math.inf, *([aim * (1 + share)] if aim else [])]
        return max(least), min(most)


class Rung(Schema):
    """One round of short training; the best candidates continue in the next round (successive halving)."""

    num_steps: PositiveInt
    """Optimizer steps of this round. A candidate continues from the weights of the round before."""
    keep: PositiveInt | None = None
    """Candidates that continue in the next round. null: half of them. Ignored in the last round."""
