"""Making NeMo-Aligner's environment: what can go wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_minitron.backends.alignment.nemo_aligner import environment
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.places import CONSTRAINTS, shipped_dir
from nemo_minitron.system.progress import Progress

PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([A-Za-z0-9_.+-]+)( ; [^;]+)?$")


def test_every_requirement_is_pinned() -> None:
    lines = [line for line in environment.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    found = [PIN.match(line) for line in lines]
    assert all(found)
    pinned = {match[1]: match[2] for match in found if match is not None}
    assert pinned["nemo-aligner"] == environment.SUPPORTED_ALIGNER
    assert pinned["megatron-core"] == "0.10.0"
    assert "torch" not in pinned  # that of this machine


def test_the_folder_changes_with_the_requirements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = environment.environment_dir()
    other = tmp_path / "requirements.txt"
    other.write_text("nemo-aligner==0.8.0\n")
    monkeypatch.setattr(environment, "REQUIREMENTS", other)
    assert environment.environment_dir() != before


def test_a_failed_installation_names_the_place_and_leaves_no_usable_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "torch_requirement", lambda: "torch==0.0.0")
    # NeMo-Aligner's dependencies take two minutes, so pip installs only packages here that it has installed already.
    monkeypatch.setattr(environment, "LOCK", shipped_dir(CONSTRAINTS) / "build.lock")
    with pytest.raises(EnvironmentProblem, match=r"torch==0\.0\.0 ended with code 1") as error:
        environment.make_environment(Progress(silent=True), torch_index_url="file:///nowhere")
    assert "aligner-" in str(error.value.where)
    assert not environment.is_ready()
