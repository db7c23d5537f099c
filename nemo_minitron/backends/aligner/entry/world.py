"""Joins the task's processes before Lightning does, which would listen on every network interface for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch

MEETING = Path(__file__).resolve().parents[2] / "megatron" / "meeting.py"
"""Of nemo_minitron, which this environment need not have."""
TIMEOUT = timedelta(minutes=30)


@contextmanager
def joined() -> Iterator[None]:
    """Inside, torch.distributed runs among processes of one machine; Lightning starts it for those of several."""
    meeting = _meeting()
    if not meeting.is_of_one_machine():
        yield
        return
    on_gpu = torch.cuda.is_available()
    with meeting.among_ourselves():
        meeting.join("nccl" if on_gpu else "gloo", TIMEOUT)
        yield
        if on_gpu:
            torch.distributed.destroy_process_group()


def _meeting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minitron_meeting", MEETING)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
