"""Errors of ranks on any node reach the user, also when a stop is requested at the same time."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron import api
from nemo_minitron.errors import DataError, Interrupted, MinitronError, ProcessesDied
from nemo_minitron.execution import job, ranks, worker
from nemo_minitron.execution.ranks import load_error, run_ranks, save_error
from nemo_minitron.execution.task import StageTask
from nemo_minitron.processes import exchange
from nemo_minitron.processes.nodes import RUNNER_VARIABLE
from nemo_minitron.system.interrupts import StopRequest
from tests.conftest import TOY

BAD_TEXT = DataError("the text is damaged")
STOPPED = Interrupted("Stopped in stage score by SIGTERM")


@pytest.fixture
def task(tmp_path: Path) -> StageTask:
    plan = api.plan(api.load_recipe(TOY, [f"execution.run_root={tmp_path}", "execution.parallel.dp=2"]))
    work = tmp_path / "toy/width/.work/score"
    work.mkdir(parents=True)
    return StageTask.of(plan.call("score"), plan.recipe, tmp_path / "out", work)


@pytest.fixture
def rank(task: StageTask, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that runs a rank of the task whose stage ends with an error; it returns the exit code."""
    monkeypatch.setattr(worker, "exit_without_parent", lambda _: None)
    monkeypatch.setattr(worker, "Store", lambda _: type("NoInputs", (), {"inputs": lambda self, names: None})())
    monkeypatch.setenv(RUNNER_VARIABLE, str(os.getpid()))
    task.save()
    exchange.prepare(task.work_dir)
    handlers, on_hangup = logging.getLogger().handlers[:], signal.getsignal(signal.SIGHUP)

    def run(number: int, error: BaseException) -> int:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setattr(worker, "run_task", fail)
        return worker.main(task.file)

    yield run
    logging.getLogger().handlers[:] = handlers
    signal.signal(signal.SIGHUP, on_hangup)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt("SIGTERM"), STOPPED], ids=["signal", "stop"])
@pytest.mark.parametrize("order", [1, -1])
def test_an_error_of_any_rank_wins_over_an_interruption(
    interruption: BaseException, order: int, task: StageTask, rank: Any
) -> None:
    codes = [rank(*ended) for ended in [(1, BAD_TEXT), (0, interruption)][::order]]
    assert codes == [2, 0][::order]
    found = load_error(task.work_dir)
    assert isinstance(found, DataError)
    assert found.what == BAD_TEXT.what


def _end_with(code: int, written: MinitronError | None, task: StageTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the ranks of `run_ranks` with ones that have ended with this code and error."""

    def start(*_: object) -> None:
        if written is not None:
            save_error(written, task.work_dir)

    monkeypatch.setattr(ranks, "start_everywhere", start)
    monkeypatch.setattr(ranks, "_wait", lambda *_, **__: code)


@pytest.mark.parametrize(("written", "raised"), [(BAD_TEXT, DataError), (STOPPED, Interrupted), (None, Interrupted)])
def test_a_stop_request_does_not_hide_an_error(
    written: MinitronError | None, raised: type[MinitronError], task: StageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    _end_with(2, written, task, monkeypatch)
    stop = StopRequest(task.run_dir)
    (task.run_dir / "STOP").touch()
    with pytest.raises(raised):
        run_ranks(task, stop)


@pytest.mark.parametrize(("code", "raised"), [(1, ProcessesDied), (0, Interrupted)])
def test_an_interruption_by_the_crash_of_another_rank_is_no_stop(
    code: int, raised: type[MinitronError], task: StageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash, torchrun and ft_launcher end the other ranks with SIGTERM, and fail."""
    _end_with(code, STOPPED, task, monkeypatch)
    with pytest.raises(raised):
        run_ranks(task, StopRequest(task.run_dir))


def test_a_finished_stage_keeps_its_result_if_a_stop_is_requested_meanwhile(
    task: StageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    _end_with(0, None, task, monkeypatch)
    monkeypatch.setattr(ranks, "start_everywhere", lambda *_: exchange.save_result({"loss": 2.0}, task.work_dir))
    (task.run_dir / "STOP").touch()
    assert run_ranks(task, StopRequest(task.run_dir)) == {"loss": 2.0}


@pytest.mark.parametrize(
    ("written", "is_stopped", "raised"),
    [
        (BAD_TEXT, False, DataError),
        (None, False, ProcessesDied),
        (STOPPED, False, ProcessesDied),
        (STOPPED, True, Interrupted),
    ],
)
def test_another_node_raises_the_error_of_its_rank(
    written: MinitronError | None,
    is_stopped: bool,
    raised: type[MinitronError],
    task: StageTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"NODES": "2", "RENDEZVOUS": "node1:20001", "ATTEMPT": "7"}
    for name, value in values.items():
        monkeypatch.setenv(f"MINITRON_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "1")

    def serve(*_: object) -> int:
        if is_stopped:
            signal.raise_signal(signal.SIGTERM)  # Slurm preempts the job: it sends the signal to every node
        if written is not None:
            save_error(written, task.work_dir)
        return 2

    exchange.prepare(task.work_dir)
    monkeypatch.setattr(job, "serve_requests", serve)
    recipe = api.load_recipe(TOY, [f"execution.run_root={task.run_dir.parents[1]}"])
    with pytest.raises(raised):
        job.run_in_job(recipe, "score")
