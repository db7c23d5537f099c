"""How much of each text source a training uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DATA_USED_FILE = "data_used.json"
MAX_USEFUL_EPOCHS = 4.0
"""Up to 4 epochs, repeated text is about as good as new text; after that its value decays (2305.16264)."""

Sources = Sequence[Mapping[str, Any]]
"""Training sources as listed in data.json: source, weight, num_tokens."""


def data_used(sources: Sources, tokens_of_each: Sequence[float]) -> list[dict[str, Any]]:
    """Return [{source, weight, tokens, epochs}]; an epoch is one pass over the tokens of a source."""
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
    """Return the expected use of each source, in proportion to its weight, when training on `tokens` tokens."""
    whole = sum(float(source["weight"]) for source in sources)
    return data_used(sources, [tokens * float(source["weight"]) / whole for source in sources])
