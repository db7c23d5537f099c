"""The suite of `make results`: what has figures is skipped, and figures of another teacher or text are refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import REPO


@pytest.fixture
def ran() -> list[str]:
    return []


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    module = importlib.import_module("results")

    def experiment(name: str) -> Any:
        def run(_: Any) -> dict[str, Any]:
            if len(ran) == 2:
                raise KeyboardInterrupt
            ran.append(name)
            return {"loss": len(ran)}

        return run

    monkeypatch.setattr(module, "EXPERIMENTS", {name: experiment(name) for name in ("teacher", "methods", "rounds")})
    return module


def _measure(results: ModuleType, file: Path, origin: str = "one", names: Any = None, again: bool = False) -> None:
    """Do what `main` does after the teacher and the text exist."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    todo = results.missing(names or list(results.EXPERIMENTS), found, origin, file, again=again)
    results.measure(todo, None, found, origin, file)


def test_a_stopped_suite_continues_with_the_experiments_that_are_missing(
    results: ModuleType, ran: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    for again in (False, True):
        with pytest.raises(KeyboardInterrupt):
            _measure(results, file, again=again)
        assert ran == ["teacher", "methods"]
        ran.clear()
        _measure(results, file)
        assert ran == ["rounds"]
        _measure(results, file)
        assert ran == ["rounds"]
        ran.clear()


def test_figures_of_another_teacher_or_text_are_refused_until_all_are_measured_again(
    results: ModuleType, ran: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    _measure(results, file, names=["methods"])
    before = file.read_text()
    for more in ({}, {"names": ["rounds"]}, {"names": ["rounds"], "again": True}):
        with pytest.raises(SystemExit, match=r"of another teacher.*: methods"):
            _measure(results, file, origin="two", **more)
    assert file.read_text() == before
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        _measure(results, file, origin="two", again=True)
    ran.clear()
    _measure(results, file, origin="two")
    assert ran == ["rounds"]


def test_the_teacher_and_the_text_are_those_of_the_run(results: ModuleType, tmp_path: Path) -> None:
    found = set()
    for teacher, data in (("a", "b"), ("a", "c"), ("d", "b")):
        for stage, fingerprint in (("teacher", teacher), ("data", data)):
            (tmp_path / stage).mkdir(exist_ok=True)
            (tmp_path / stage / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint}))
        found.add(results.made_from(tmp_path))
    assert len(found) == 3
