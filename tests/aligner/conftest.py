"""What runs in NeMo-Aligner's environment: made by `minitron env aligner`, or named by MINITRON_ALIGNER_PYTHON."""

from __future__ import annotations

import os

import pytest

from nemo_minitron.backends.aligner.environment import aligner_python
from nemo_minitron.errors import EnvironmentProblem


@pytest.fixture(scope="session", autouse=True)
def _aligner() -> None:
    """`make test` makes the environment and sets the variable, so that nothing is skipped there."""
    try:
        aligner_python()
    except EnvironmentProblem:
        if os.environ.get("MINITRON_REQUIRE_ALIGNER"):
            raise
        pytest.skip("minitron env aligner has not been run")
