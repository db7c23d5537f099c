"""Start of torch.distributed before Lightning starts it, which would listen on every network interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from task import load_backend_module

TIMEOUT = timedelta(minutes=30)


@contextmanager
def joined() -> Iterator[None]:
    """Run torch.distributed among the processes of one machine; for several machines, Lightning starts it."""
    rendezvous = load_backend_module("megatron/runtime/rendezvous.py")
    if not rendezvous.is_single_machine():
        yield
        return
    on_gpu = torch.cuda.is_available()
    with rendezvous.restricted_to_own_user():
        rendezvous.join("nccl" if on_gpu else "gloo", TIMEOUT)
        yield
        if on_gpu:
            torch.distributed.destroy_process_group()
