"""Number of inputs of property tests: few in `make test`, many in `make test-all`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

MANY = os.environ.get("MINITRON_MANY_EXAMPLES") == "1"
TIMES = 12
"""Factor of the number of examples in `make test-all`."""


def budget(few: int) -> settings:
    """Return settings that try `few` examples in `make test`, and `TIMES` as many in `make test-all`.

    The fast run draws the same examples every time, so that a change is judged on its own; the long run draws new ones.
    """
    return settings(
        max_examples=few * TIMES if MANY else few,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        print_blob=True,
    )
