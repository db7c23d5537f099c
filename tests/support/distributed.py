"""Run functions in separate processes: on several ranks, as torchrun does, or independently."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch.multiprocessing as mp

from nemo_minitron.processes.agent import rendezvous_folder

PRELOADED = [
    "nemo_minitron.backends.megatron.distillation.distill",
    "nemo_minitron.backends.megatron.training.loop",
    "transformers",
]
"""Modules that are imported once for each test process, not for each rank, because that takes seconds."""


def process_context() -> BaseContext:
    """Return a context that forks from a process with only the libraries imported, with its environment.

    Where CUDA is there each process starts anew: the imports may begin with CUDA, which no fork survives.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run function(*args) on every rank, each in its own process, and return the results in rank order.

    The function must be importable; results must survive a pipe (tensors do). The environment is that of this
    process's first call.
    """
    # The ranks meet in a folder, as those of a stage do: a port that is free now may be taken a moment later.
    with rendezvous_folder() as rendezvous:
        return _run_ranks(world_size, rendezvous, function, args)


def _run_ranks(
    world_size: int, rendezvous: Mapping[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> list[Any]:
    context = process_context()
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_one_rank, args=(rank, world_size, rendezvous, queue, function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    for _ in processes:
        rank, ok, value = queue.get()
        if not ok:
            for process in processes:
                process.terminate()
            raise AssertionError(f"rank {rank} failed:\n{value}")
        results[rank] = value
    for process in processes:
        process.join(60)
    return [results[rank] for rank in range(world_size)]


def _one_rank(
    rank: int, world_size: int, rendezvous: Mapping[str, str], queue: Any, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(rendezvous, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        queue.put((rank, True, function(*args)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
