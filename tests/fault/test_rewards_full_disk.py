"""A disk that is full in a training on rewards: one message, nothing left running, and with room it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_toy_rewards import BEFORE
from tests.fault.test_rewards_kills import before as before  # a fixture
from tests.fault.test_rewards_kills import require_nothing_left, start
from tests.support.disks import SmallDisk, small_disk
from tests.support.processes import mark_of, output_of, wait_for_step

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "full_from_step"), [("reinforce", None), ("reinforce", 3), ("ppo", 3)], ids=["start", "reinforce", "ppo"]
)
def test_a_full_disk_ends_the_stage_and_with_room_it_goes_on(
    kind: str, full_from_step: int | None, before: Path, disk: SmallDisk
) -> None:
    run = disk.path / "toy" / kind
    for stage in BEFORE:
        shutil.copytree(before / stage, run / stage)
    curves = run / f".work/{kind}/training/curves.jsonl"
    if full_from_step is None:
        disk.leave(1 << 17)  # room for the prompts, not for the converted model
    first = start(kind, disk.path)
    mark = mark_of(first)
    if full_from_step is not None:
        wait_for_step(curves, full_from_step, first, timeout_s=600)
        disk.leave(0)
    output = " ".join(output_of(first, 300).split())
    assert first.returncode == 2, output
    assert output.count("error:") == 1
    assert "disk is full" in output
    assert f"where: {run}" in output
    assert not (run / kind).exists()
    assert not list(run.glob(".partial-*"))
    require_nothing_left(mark)
    disk.leave(1 << 29)
    second = start(kind, disk.path)
    output = output_of(second, 900)
    assert second.returncode == 0, output
    rows = [json.loads(line) for line in (run / kind / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4, 5, 6]
    assert sum(row["step"] == 0 for row in rows) == 1
