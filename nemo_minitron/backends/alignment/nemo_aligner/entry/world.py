"""Joins the task's processes before Lightning does, which would listen on every network interface for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from task import of_the_package

TIMEOUT = timedelta(minutes=30)


@contextmanager
def joined() -> Iterator[None]:
    """Inside, torch.distributed runs among processes of one machine; Lightning starts it for those of several."""
    rendezvous = of_the_package("megatron/runtime/rendezvous.py")
    if not rendezvous.is_single_machine():
        yield
        return
    on_gpu = torch.cuda.is_available()
    with rendezvous.restricted_to_own_user():
        rendezvous.join("nccl" if on_gpu else "gloo", TIMEOUT)
        yield
        if on_gpu:
            torch.distributed.destroy_process_group()
