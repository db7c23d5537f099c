"""Warnings about stages that hold out different rows of the same chat files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.chats import ChatRows


def heldout_warnings(stages: Mapping[str, StageParams]) -> Iterator[str]:
    """Yield one line for each two stages that split a source differently, so that one trains on the other's held-out
    rows."""
    chats = [(name, stage) for name, stage in stages.items() if isinstance(stage, ChatRows)]
    for (one, first), (other, second) in combinations(chats, 2):
        shared = sorted({source.source for source in first.sources} & {source.source for source in second.sources})
        if shared and (first.valid_rows, first.seed) != (second.valid_rows, second.seed):
            yield (
                f"stages.{one} and stages.{other} both read {', '.join(shared)}, with valid_rows = {first.valid_rows} "
                f"and {second.valid_rows}, seed = {first.seed} and {second.seed}: a model may be trained on rows that "
                "the other stage holds out. Give both stages the same valid_rows and seed."
            )
