"""Seconds of a stage over its attempts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nemo_minitron.artifacts.manifest import provenance
from nemo_minitron.execution.attempts import ATTEMPTS_FILE, begin_attempt


def _ended(work: Path, progress: Path, seconds: float) -> None:
    """Let the current attempt last this long."""
    began = json.loads((work / ATTEMPTS_FILE).read_text())["began"]
    progress.write_text("{}")
    os.utime(progress, (began + seconds, began + seconds))


def test_interrupted_attempts_count_until_their_last_progress(tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    assert begin_attempt(tmp_path, progress) == 0.0
    _ended(tmp_path, progress, 100.0)
    assert begin_attempt(tmp_path, progress) == pytest.approx(100.0, abs=0.1)
    _ended(tmp_path, progress, 20.0)
    assert begin_attempt(tmp_path, progress) == pytest.approx(120.0, abs=0.1)


def test_an_attempt_without_progress_or_with_a_clock_set_back_counts_nothing(tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    begin_attempt(tmp_path, progress)
    assert begin_attempt(tmp_path, progress) == 0.0
    _ended(tmp_path, progress, -50.0)
    assert begin_attempt(tmp_path, progress) == 0.0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"began": 1.0}', '{"began": "x", "earlier_s": 1}'])
def test_a_damaged_record_counts_nothing(text: str, tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    progress.touch()
    (tmp_path / ATTEMPTS_FILE).write_text(text)
    assert begin_attempt(tmp_path, progress) == 0.0
    _ended(tmp_path, progress, 100.0)
    assert begin_attempt(tmp_path, progress) == pytest.approx(100.0, abs=0.1)


def test_the_manifest_has_the_seconds_of_all_attempts() -> None:
    import time

    assert provenance(time.monotonic(), 120.0)["wall_s"] == pytest.approx(120.0, abs=1.0)
