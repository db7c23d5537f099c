"""What runs in NeMo-Aligner's environment: made by `minitron env aligner`, or named by MINITRON_ALIGNER_PYTHON."""

from __future__ import annotations

import pytest

from tests.support.aligner import require_aligner


@pytest.fixture(scope="session", autouse=True)
def _aligner() -> None:
    require_aligner()
