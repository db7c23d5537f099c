"""Typed access to the values of a config.json, with errors that contain the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.system.shown import shown

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000
"""More layers than any model has; a larger number would make the checks slow."""


def size(value: Any, key: str, where: str) -> int:
    """Read a size, a whole number of at least 1.

    Raises:
        CheckpointError: the key is missing, or its value is not a size.
    """
    if value is None:
        raise CheckpointError(
            f"config.json has no key '{key}'.", where=where, next_step="Is this a complete Hugging Face model?"
        )
    most = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CheckpointError(
            f"{key} = {shown(value)} is not a size.", where=where, allowed=f"a whole number, 1 to {most}"
        )
    return value


def positive(value: Any, key: str, where: str) -> float:
    """Read a finite number above 0.

    Raises:
        CheckpointError: the value is anything else, such as a number in quotes.
    """
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not (math.isfinite(number) and number > 0.0):
        raise CheckpointError(f"{key} = {shown(value)} is not supported.", where=where, allowed="a number above 0")
    return number


def switch(value: Any, key: str, where: str) -> bool:
    """Read true or false; null means false.

    Raises:
        CheckpointError: the value is anything else. transformers would read the text "false" as true.
    """
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{key} = {shown(value)} is not a switch.", where=where, allowed="true, false")
    return bool(value)


def table(value: Any, key: str, where: str) -> Mapping[str, Any]:
    """Read a JSON object; null means an empty one.

    Raises:
        CheckpointError: the value is anything else.
    """
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{key} = {shown(value)} is not an object.", where=where, allowed="null, or {...}")
    return value or {}
