"""Sessions: long work of one rank, timeouts, and deterministic algorithms."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime import session as sessions
from nemo_minitron.backends.megatron.runtime import torch_versions
from nemo_minitron.backends.megatron.runtime.session import DETERMINISTIC, open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.system.progress import Progress
from tests.support.distributed import run_ranks
from tests.support.tiny_distill import TWENTY_STEPS, distill_folders

SHORT = timedelta(seconds=2)


def long_work() -> tuple[bool, list[int], float]:
    """Return whether a plain barrier survives work longer than the timeout, and whether the session does."""
    with patch.object(sessions, "TIMEOUT", SHORT), open_session(Parallel(dp=2), device="cpu", threads=1) as session:
        started_s = time.monotonic()
        with session.main_works():
            if session.is_main:
                time.sleep(2 * SHORT.total_seconds())
        waited_s = time.monotonic() - started_s
        if session.is_main:
            time.sleep(2 * SHORT.total_seconds())
        gathered = session.gather(session.rank)
        if session.is_main:
            time.sleep(2 * SHORT.total_seconds())
        try:
            dist.barrier()
        except RuntimeError:
            return False, gathered, waited_s
        return True, gathered, waited_s


def test_ranks_wait_for_the_main_one_for_longer_than_the_timeout() -> None:
    ranks = run_ranks(2, long_work)
    assert not all(passed for passed, _, _ in ranks), "the timeout must matter for this to mean anything"
    assert all(gathered == [0, 1] for _, gathered, _ in ranks)
    assert all(waited_s >= 2 * SHORT.total_seconds() for _, _, waited_s in ranks)


def waits(timeout_s: float) -> float:
    """Return the seconds until a collective operation fails because another rank does not join, or 0."""
    with open_session(Parallel(dp=2), device="cpu", threads=1) as session:
        session.set_timeout(timedelta(seconds=timeout_s))
        started_s = time.monotonic()
        if session.is_main:
            time.sleep(3 * timeout_s)
            return 0.0
        with pytest.raises(RuntimeError):
            session.sum(torch.ones(1))
        return time.monotonic() - started_s


@pytest.mark.skipif(torch_versions._VERSION < (2, 9), reason="the timeout of an open gloo group does not change")
def test_a_timeout_can_be_changed_in_an_open_session() -> None:
    _, waited_s = run_ranks(2, waits, 2.0)
    assert 1.0 < waited_s < 5.5


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms_are_used_inside_the_session_only(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in DETERMINISTIC:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    found: dict[str, Any] = {}
    with open_session(Parallel(), device="cpu", threads=1, deterministic=deterministic):
        found = {name: os.environ.get(name) for name in DETERMINISTIC}
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    expected: dict[str, Any] = dict(DETERMINISTIC) if deterministic else dict.fromkeys(DETERMINISTIC)
    assert found == {**expected, "NCCL_ALGO": "Tree"}, "a variable of the user stays"
    assert not torch.are_deterministic_algorithms_enabled()
    assert {name for name in DETERMINISTIC if name in os.environ} == {"NCCL_ALGO"}


def test_a_training_waits_less_for_other_ranks_after_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    plain_step = training.train_step
    monkeypatch.setattr(sessions.Session, "set_timeout", lambda _, timeout: events.append(timeout))
    monkeypatch.setattr(training, "train_step", lambda *args: (events.append("step"), plain_step(*args))[1])
    folders, work = distill_folders(tmp_path), tmp_path / "training"
    work.mkdir()
    params = TWENTY_STEPS.model_copy(update={"num_steps": 3, "valid_interval_steps": 3})
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = distill.prepare(params, folders["student"], folders["teacher"], folders["data"], work, session)
        training.run(job, work, Progress(silent=True))
    assert events == ["step", sessions.STEP_TIMEOUT, "step", "step", sessions.TIMEOUT]
    assert sessions.STEP_TIMEOUT < sessions.TIMEOUT
