"""Rows for fine-tuning and preference training from benchmark questions with a correct and a wrong answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from nemo_minitron.data.benchmark_passages import Row, answer, unique_docs

_AROUND = re.compile(r"^Question:\s*|\s*Answer:\s*$")


def answers(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return rows {"prompt", "completion"} of the requests of one task."""
    return [{"prompt": _question(doc), "completion": _sentence(answer(doc))} for doc, _ in _with_wrong(rows)]


def pairs(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return rows {"prompt", "chosen", "rejected", rewards}; a hash of the question picks the wrong answer."""
    return [
        {
            "prompt": _question(doc),
            "chosen": _sentence(answer(doc)),
            "rejected": _sentence(wrong),
            "chosen_reward": 1.0,
            "rejected_reward": 0.0,
        }
        for doc, wrong in _with_wrong(rows)
    ]


def _with_wrong(rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
    for doc in unique_docs(rows):
        right = answer(doc)
        wrong = [
            text for choice in doc["choices"] if (text := str(choice).strip()) and _sentence(text) != _sentence(right)
        ]
        if right and wrong:
            digest = hashlib.sha256(str(doc["query"]).encode()).digest()
            yield doc, wrong[int.from_bytes(digest[:4], "big") % len(wrong)]


def _question(doc: Row) -> str:
    context = f"{doc['context'].strip()} {doc['question'].strip()}" if "context" in doc and "question" in doc else None
    return context or _AROUND.sub("", _AROUND.sub("", str(doc["query"]).strip()))


def _sentence(text: str) -> str:
    """Format an answer as a sentence, with a capital letter and a period."""
    sentence = text[0].upper() + text[1:]
    return sentence if sentence[-1] in ".!?" else sentence + "."
