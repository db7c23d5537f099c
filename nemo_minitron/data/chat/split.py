"""Which rows are held out and how often one is written: by hashes of the text, so that the order of files is free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def text_hash(seed: int, text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest(), "big")


def heldout_questions(num_rows: Mapping[int, int], valid_rows: int) -> set[int]:
    """Hashes of the questions whose rows are held out, at most `valid_rows` rows in all.

    Args:
        num_rows: hash of a question -> rows that begin with it; they are never divided.
    """
    out, left = set(), valid_rows
    for question in sorted(num_rows):
        if num_rows[question] <= left:
            out.add(question)
            left -= num_rows[question]
        if left == 0:
            break
    return out


def copies(weight: float, row_hash: int) -> int:
    """How often a row of this weight is written: on average over rows, the weight."""
    whole = int(weight)
    return whole + (row_hash < (weight - whole) * 2**64)
