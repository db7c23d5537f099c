"""The final number of an answer, as in GSM8K (2110.14168)."""

from __future__ import annotations

import re
from fractions import Fraction

_PLAIN = str.maketrans({"\u2212": "-", **dict.fromkeys("\u00a0\u2009\u202f", " "), **dict.fromkeys("$€£¥₹")})
"""Replaces the Unicode minus and spaces inside numbers, and removes currency signs."""
_RUN = r"(?:(?<![\w).])[-+])?(?:(?<![\w.])\.)?\d+(?:[.,/]\d+)*"
"""Digits with what joins them. A sign after a digit, letter or bracket is a hyphen or an operator."""
_LAST = re.compile(_RUN)
_MARKED = re.compile(rf"####\s*({_RUN}(?: \d{{3}}(?!\d))*(?:\.\d+)?)")
_READABLE = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d+)?|\.\d+|\d+/\d+)")


def final_number(text: str) -> Fraction | None:
    """Return the number that follows the last `####` with one, otherwise the last number of the text.

    Commas separate thousands, and a/b is a fraction. None: there is no number, or that number can be read in more than
    one way, such as 3,5.
    """
    plain = text.translate(_PLAIN)
    found = _MARKED.findall(plain) or _LAST.findall(plain)
    if not found or _READABLE.fullmatch(found[-1]) is None:
        return None
    try:
        return Fraction(found[-1].replace(",", "").replace(" ", ""))
    except (ValueError, ZeroDivisionError):  # more digits than Python reads, or a division by zero
        return None


def is_exact_match(text: str, wanted: str) -> bool:
    """Return whether both texts have the same final number."""
    number = final_number(text)
    return number is not None and number == final_number(wanted)
