"""Exact texts of report.md of a made-up run. After an intended change, run UPDATE_GOLDEN=1 pytest tests/golden."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_minitron.report.collect import collect
from nemo_minitron.report.markdown import render_markdown
from tests.support.fake_run import fake_run

GOLDEN = Path(__file__).parent


@pytest.mark.parametrize("kind", ["width", "depth", "search"])
def test_the_markdown_report_is_unchanged(kind: str, tmp_path: Path) -> None:
    stages = fake_run(tmp_path, depth=kind == "depth", search=kind == "search")
    facts = collect(f"A model made small by {kind}", f"example/{kind}", stages)
    text, file = render_markdown(facts), GOLDEN / f"report_{kind}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")
