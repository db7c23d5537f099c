"""Choosing the held-out rows and the copies of each row by hashes of the text, independently of the files' order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def text_hash(seed: int, text: str) -> int:
    """Return a 64-bit hash of the text."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest(), "big")


def heldout_questions(num_rows: Mapping[int, int], valid_rows: int) -> set[int]:
    """Return the hashes of the questions whose rows are held out, at most `valid_rows` rows in all.

    Args:
        num_rows: hash of a question -> number of rows that begin with it; these rows are kept together.
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
    """Return how often to write a row, so that the mean over many rows is `weight`."""
    whole = int(weight)
    return whole + (row_hash < (weight - whole) * 2**64)
