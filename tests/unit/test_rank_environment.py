"""Environment of the ranks: settings that the user has not made."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.execution import ranks


@pytest.mark.parametrize(("threads", "compilers"), [(1, "1"), (3, "3"), (32, "4")])
def test_ranks_compile_with_few_threads_and_record_their_last_collective_operations(
    threads: int, compilers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    found = ranks._defaults(threads, Path("/run/logs/distill.nccl_trace_rank_"))
    assert found["TORCHINDUCTOR_COMPILE_THREADS"] == compilers
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    for size, file in (
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"),
    ):
        assert int(found[size]) > 0
        assert found[file] == "/run/logs/distill.nccl_trace_rank_"


def test_the_users_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "16")
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in ranks._defaults(2, Path("x"))
