"""A process on a CPU keeps the memory that tensors free, unless its user has configured the heap."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from nemo_minitron import api
from nemo_minitron.system.heap import collector_paused, environment_of_children, keep_freed_memory

FAULTS = """
import resource, sys
import torch
from nemo_minitron.system.heap import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory({}):
    print("not here")
    sys.exit()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill(times):
    for _ in range(times):
        torch.ones(16 << 20)  # 64 MiB, freed at once
fill(20)  # glibc's caches of small pieces are full after some
before = faults()
fill(8)
print(faults() - before)
"""
PAGES = 8 * (64 << 20) // 4096


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env={})
    if done.stdout.strip() == "not here":
        pytest.skip("no glibc")
    return int(done.stdout)


def test_freed_tensors_cost_no_new_pages() -> None:
    assert _faults("keep") < PAGES / 100 < _faults("leave")


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_heap_that_the_user_has_set_up_stays(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
    assert environment_of_children({name: "1"}) == {}


def test_a_recipe_is_loaded_and_planned_without_collections() -> None:
    """Garbage collections would take a tenth of the time of `minitron check`."""
    collections: list[str] = []

    def count(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    gc.callbacks.append(count)
    try:
        api.load_plan("toy/width", checked=False)
        assert not collections
        assert gc.isenabled()
        gc.collect()
        assert collections
    finally:
        gc.callbacks.remove(count)


def test_objects_of_the_pause_are_collected_later() -> None:
    class Cycle:
        deleted = 0

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            Cycle.deleted += 1

    with collector_paused():
        Cycle()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert Cycle.deleted == 1


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
