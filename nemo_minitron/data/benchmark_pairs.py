"""Rows for fine-tuning, preference training and rewards by rules from benchmark questions with their answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from nemo_minitron.data.benchmark_passages import Row, answer, unique_docs

_WORD = re.compile(r"[a-z]{5,}")
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


def instructions(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return rows {"prompt", "completion", "instruction_id_list", "kwargs"}: each question with one rule of IFEval.

    A hash of the question picks the rule. The answer is that of the question, and may not follow it.
    """
    return [{**row, **_with_rule(row["prompt"])} for row in answers(rows) if row["prompt"].endswith("?")]


def _with_rule(question: str) -> dict[str, Any]:
    number = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big")
    words = sorted(set(_WORD.findall(question.lower())), key=lambda word: (-len(word), word))
    num_words = 5 + number // 4 % 6
    at_least = {"relation": "at least", "num_words": num_words + 4}
    rules: list[tuple[str, str, dict[str, Any]]] = [
        (f"Use at least {num_words + 4} words.", "length_constraints:number_words", at_least),
        (
            f"Use fewer than {num_words} words.",
            "length_constraints:number_words",
            {"relation": "less than", "num_words": num_words},
        ),
        ("Use lowercase letters only.", "change_case:english_lowercase", {}),
    ]
    if words:
        rules.append((f"Use the word {words[0]}.", "keywords:existence", {"keywords": [words[0]]}))
    text, name, settings = rules[number % len(rules)]
    return {"prompt": f"{question} {text}", "instruction_id_list": [name], "kwargs": [settings]}


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
