"""Keys of a search's grid, constraints and rungs."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from nemo_minitron.schema.base import Fraction, Schema


class SearchGrid(Schema):
    """Sizes to try; every combination is a point. What is left out stays as in the teacher."""

    num_layers: tuple[PositiveInt, ...] = ()
    hidden_size: tuple[PositiveInt, ...] = ()
    ffn_hidden_size: tuple[PositiveInt, ...] = ()
    ffn_expansion: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    """Instead of ffn_hidden_size: times the hidden size."""
    num_attention_heads: tuple[PositiveInt, ...] = ()
    num_query_groups: tuple[PositiveInt, ...] = ()

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> SearchGrid:
        if self.ffn_hidden_size and self.ffn_expansion:
            raise ValueError("give ffn_hidden_size or ffn_expansion, not both")
        return self


class Hardware(Schema):
    """What the modelled time of a token assumes; the defaults are an H100 SXM's data sheet, dense 16-bit."""

    memory_gb_per_s: Annotated[float, Field(gt=0.0)] = 3350.0
    tflops: Annotated[float, Field(gt=0.0)] = 989.0
    layer_overhead_us: Annotated[float, Field(ge=0.0)] = 10.0
    """Fixed cost of one layer in a decoding step (kernel launches); an assumption, not a measurement."""


class SearchConstraints(Schema):
    """What a candidate must keep to."""

    num_params: Annotated[float, Field(gt=0.0)] | None = None
    """Parameters to aim at."""
    num_params_tolerance: Fraction = 0.05
    """Largest distance from num_params, as a share of it."""
    num_params_min: Annotated[float, Field(gt=0.0)] | None = None
    num_params_max: Annotated[float, Field(gt=0.0)] | None = None
    context_tokens: PositiveInt = 4096
    """Tokens of each sequence in the KV cache, for memory and time."""
    batch_size: PositiveInt = 1
    """Sequences that are generated at a time."""
    max_memory_gib: Annotated[float, Field(gt=0.0)] | None = None
    """16-bit weights and KV cache."""
    max_decode_ms: Annotated[float, Field(gt=0.0)] | None = None
    """Modelled time of one token of every sequence."""
    min_generate_tokens_per_s: Annotated[float, Field(gt=0.0)] | None = None
    """Measured on this machine, right after pruning; slower candidates are not trained. Needs `measure_speed`."""
    hardware: Hardware = Hardware()
    max_candidates: PositiveInt = 64
    """More points than this are an error: each one is trained."""

    @property
    def num_params_range(self) -> tuple[float, float]:
        """The tightest of what the keys say."""
        aim, share = self.num_params, self.num_params_tolerance
        least = [self.num_params_min or 0.0, *([aim * (1 - share)] if aim else [])]
        most = [self.num_params_max or math.inf, *([aim * (1 + share)] if aim else [])]
        return max(least), min(most)


class Rung(Schema):
    """One round of short training; the best go on to the next (successive halving)."""

    num_steps: PositiveInt
    """In this round; a candidate goes on from where the round before left its weights."""
    keep: PositiveInt | None = None
    """Candidates that go on; null: half of them. No meaning in the last round."""
