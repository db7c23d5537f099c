"""Fixtures of the security tests."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest


@pytest.fixture
def soon() -> Iterator[None]:
    """Require that a refusal takes only seconds of processor time."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < 10
