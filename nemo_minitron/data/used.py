"""How much of each source of text a training draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DATA_USED_FILE = "data_used.json"
MOST_EPOCHS = 4.0
"""2305.16264: text that is read up to 4 times is about as good as new text; beyond, it is worth less and less."""

Sources = Sequence[Mapping[str, Any]]
"""Training sources as data.json lists them: source, weight, num_tokens."""


def data_used(sources: Sources, tokens_of_each: Sequence[float]) -> list[dict[str, Any]]:
    """[{source, weight, tokens, epochs}]; an epoch is as many tokens as the source has."""
    return [
        {
            "source": source["source"],
            "weight": source["weight"],
            "tokens": tokens,
            "epochs": tokens / source["num_tokens"],
        }
        for source, tokens in zip(sources, tokens_of_each, strict=True)
    ]


def expected_use(sources: Sources, tokens: int) -> list[dict[str, Any]]:
    """What a training on so many tokens will draw: each source its share by weight."""
    whole = sum(float(source["weight"]) for source in sources)
    return data_used(sources, [tokens * float(source["weight"]) / whole for source in sources])
