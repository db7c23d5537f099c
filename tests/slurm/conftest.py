"""One real Slurm for these tests; without it they are skipped, unless MINITRON_REQUIRE_SLURM=1."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm.cluster import SlurmCluster, Unavailable


def _running(**options: object) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="slurm-")), **options)  # type: ignore[arg-type]
    try:
        cluster.start()
    except Unavailable as error:
        cluster.stop()
        if os.environ.get("MINITRON_REQUIRE_SLURM") == "1":
            raise
        pytest.skip(str(error))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    yield from _running()


@pytest.fixture(scope="session")
def slurm_with_containers() -> Iterator[SlurmCluster]:
    yield from _running(nodes=2, containers=True)
