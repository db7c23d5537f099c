"""Environment of the ranks: settings that the user has not made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_minitron.execution import ranks


@pytest.mark.parametrize(("threads", "compilers"), [(1, "1"), (3, "3"), (32, "4")])
def test_ranks_compile_with_few_threads_and_record_their_last_collective_operations(
    threads: int, compilers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    found = ranks._defaults(threads, Path("/run/logs/distill.nccl_trace_rank_"))
    assert found["TORCHINDUCTOR_COMPILE_THREADS"] == compilers
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    size, file = ranks._flight_recorder(torch.__version__)
    assert int(found[size]) > 0
    assert found[file] == "/run/logs/distill.nccl_trace_rank_"


@pytest.mark.parametrize(
    ("version", "size"),
    [
        ("2.6.0+cpu", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        ("2.9.0", "TORCH_FR_BUFFER_SIZE"),
        ("2.13.0", "TORCH_FR_BUFFER_SIZE"),
    ],
)
def test_the_recorder_has_the_names_of_the_installed_torch(version: str, size: str) -> None:
    assert ranks._flight_recorder(version)[0] == size


def test_a_torch_that_is_not_installed_as_a_package_gets_the_old_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "installed_version", lambda _: None)
    assert "TORCH_NCCL_TRACE_BUFFER_SIZE" in ranks._defaults(1, Path("x"))


def test_the_users_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "16")
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in ranks._defaults(2, Path("x"))
