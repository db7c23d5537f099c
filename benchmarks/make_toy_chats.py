"""Make nemo_minitron/toy/{chats,pairs}.jsonl: questions about words of the toy novel, answered well and badly.

Small enough to learn in seconds, and rated by construction: an answer is right or wrong, and short or long.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import zstandard

TOY = Path(__file__).resolve().parents[1] / "nemo_minitron/toy"
NUM_CHATS, NUM_PAIRS, SEED = 240, 160, 1234


def words() -> list[str]:
    """Words of three to seven letters, by how often the novel has them, the commonest thousand."""
    with zstandard.open(TOY / "text.jsonl.zst", "rt", encoding="utf-8") as file:
        text = " ".join(json.loads(line)["text"].lower() for line in file)
    counts: dict[str, int] = {}
    for word in re.findall(r"\b[a-z]{3,7}\b", text):
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: (-counts[word], word))[:1000]


def question(word: str, kind: int) -> tuple[str, str, str]:
    """(question, right answer, what a long answer adds)."""
    return [
        (f"Spell {word}.", "-".join(word) + ".", f" That is how one spells the word {word}, letter by letter."),
        (f"How many letters has {word}?", f"{len(word)}.", f" I counted the letters of {word} one by one."),
        (f"What does {word} begin with?", f"{word[0]}.", f" The word {word} begins with that letter."),
    ][kind]


def chat(word: str, kind: int, rng: random.Random) -> dict[str, Any]:
    """A row as HelpSteer has them."""
    asked, answer, more = question(word, kind)
    right, verbose = rng.random() < 0.8, rng.random() < 0.5
    if not right:
        answer = "I do not know."
    response = answer + (more if verbose else "")
    rating = 4 if right else 0
    return {
        "prompt": asked,
        "response": response,
        "helpfulness": rating,
        "correctness": rating,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 4 if verbose else 0,
    }


def pair(word: str, kind: int) -> dict[str, Any]:
    """A right answer, and none."""
    asked, answer, _ = question(word, kind)
    return {
        "prompt": asked,
        "chosen_response": answer,
        "rejected_response": "I do not know.",
        "chosen_reward": 4.0,
        "rejected_reward": 0.0,
    }


def main() -> None:
    """Write both files."""
    rng = random.Random(SEED)
    known = words()
    rng.shuffle(known)
    chats = [chat(word, index % 3, rng) for index, word in enumerate(known[:NUM_CHATS])]
    pairs = [pair(word, index % 3) for index, word in enumerate(known[NUM_CHATS : NUM_CHATS + NUM_PAIRS])]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (TOY / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
