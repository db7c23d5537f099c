"""Ranks that do not reach each other, because another process has connected in place of one, end with an error."""

from __future__ import annotations

import multiprocessing
import os
import time
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_minitron.backends.megatron.runtime import rendezvous

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def _join(rank: int, folder: str, answers: Queue[tuple[int, str]], *, silent: bool) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", rendezvous.RENDEZVOUS_FOLDER_VARIABLE: folder}
    rendezvous.HANDSHAKE_TIMEOUT = timedelta(seconds=3)
    try:
        if silent:
            rendezvous.join("gloo", timedelta(minutes=30))
            time.sleep(600)
        with rendezvous.restricted_to_own_user():
            rendezvous.join("gloo", timedelta(minutes=30))
        answers.put((rank, "joined"))
    except rendezvous.ForeignProcessError as error:
        # The interpreter does this at exit: an operation that still waits would keep the process alive.
        dist.destroy_process_group()
        answers.put((rank, str(error)))
    answers.close()
    answers.join_thread()
    os._exit(0)


def _outcome(folder: Path, *, silent: bool) -> dict[int, str]:
    """Return rank -> outcome of joining, without a silent rank 1."""
    context = multiprocessing.get_context("spawn")
    answers: Queue[tuple[int, str]] = context.Queue()
    ranks = [
        context.Process(
            target=_join, args=(rank, str(folder), answers), kwargs={"silent": silent and rank == 1}, daemon=True
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    found = dict(answers.get(timeout=60) for _ in range(1 if silent else 2))
    for rank in ranks:
        rank.kill()
        rank.join()
    return found


@pytest.mark.skipif(
    _TORCH < (2, 9),
    reason="older gloo has one timeout for all operations of a group: such a run ends after half an hour",
)
def test_a_member_that_does_not_answer_ends_the_group_and_does_not_hang_it(tmp_path: Path) -> None:
    """gloo itself would wait for half an hour, or retry forever on a connection that a foreign process has closed."""
    assert "do not reach each other" in _outcome(tmp_path, silent=True)[0]


def test_undisturbed_ranks_reach_each_other(tmp_path: Path) -> None:
    assert _outcome(tmp_path, silent=False) == {0: "joined", 1: "joined"}
