"""Run functions in processes of their own: several that form one world, as torchrun would, or any."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch.multiprocessing as mp

from nemo_minitron.processes.nodes import free_port

PRELOADED = [
    "nemo_minitron.backends.megatron.distillation.distill",
    "nemo_minitron.backends.megatron.training.loop",
    "transformers",
]
"""Importing torch and Megatron takes seconds: once for each test process, not for each rank."""


def process_context() -> BaseContext:
    """Forks from one process that has the libraries imported and has done nothing else, with its environment.

    Where CUDA is there each process starts anew: the imports may begin with CUDA, which no fork survives.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) on every rank, each its own process; returns the results in rank order.

    The function must be importable; results must survive a pipe (tensors do). The environment is that of this
    process's first call.
    """
    context = process_context()
    port = free_port()
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_one_rank, args=(rank, world_size, port, queue, function, args))
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


def _one_rank(rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        queue.put((rank, True, function(*args)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
