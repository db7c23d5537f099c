"""Tens of thousands of damaged, contradictory and hostile files: each is read or refused, in bounded time and memory.

`make test` tries a few of each kind, in one process; `make test-faults` all of them. An input is made again with
`python -m tests.support.fuzz FOLDER NUMBER 1 READER`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.examples import MANY
from tests.support.fuzz_readers import READERS


@pytest.mark.parametrize("names", [[name] for name in READERS] if MANY else [list(READERS)], ids=",".join)
def test_every_input_is_read_or_refused(names: list[str], tmp_path: Path) -> None:
    count = "all" if MANY else "few"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fuzz", str(tmp_path), "0", count, *names],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last = max(tmp_path.glob("*/now"), key=lambda file: file.stat().st_mtime, default=None)
    assert done.returncode == 0, f"{last and last.read_text()}: {done.stderr[-3000:]}"
    assert [report["reader"] for report in reports] == names
    for report in reports:
        print(json.dumps(report))
        assert not report["faults"], report
        assert report["slowest_s"] < 10


def test_a_whole_run_has_twenty_thousand_inputs() -> None:
    assert sum(reader.count for reader in READERS.values()) >= 20_000
