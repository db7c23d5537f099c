"""One real Slurm for these tests; without it they are skipped, unless MINITRON_REQUIRE_SLURM=1."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm.cluster import SlurmCluster, Unavailable
from tests.support.slurm.runs import Run, copy_of, prepare


def _running(**options: object) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="slurm-")), **options)  # type: ignore[arg-type]
    try:
        cluster.start()
        yield cluster
    except Unavailable as error:
        if os.environ.get("MINITRON_REQUIRE_SLURM") == "1":
            raise
        pytest.skip(str(error))
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    yield from _running()


@pytest.fixture(scope="session")
def slurm_with_containers() -> Iterator[SlurmCluster]:
    yield from _running(nodes=2, containers=True)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run that is ready for distillation."""
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def undisturbed(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run that was distilled on this machine, by one process and without a stop."""
    run = copy_of(prepared, tmp_path_factory.mktemp("undisturbed"), None)
    run.call("run", "--until=distill")
    return run
