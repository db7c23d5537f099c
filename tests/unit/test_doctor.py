"""What `minitron doctor` finds on this machine, and on machines with other programs on their PATH."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from nemo_minitron import doctor
from nemo_minitron.doctor import examine, failures, is_supported
from tests.conftest import REPO, Cli


def _program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_this_machine_can_do_the_core(tmp_path: Path) -> None:
    found = examine(tmp_path / "not/there/yet")
    assert failures(found, []) == []
    by_name = {one.what: one for one in found}
    assert by_name["megatron-core"].level == "ok"
    assert "MiB/s" in by_name["disk"].text
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"


def test_programs_on_the_path_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    _program(programs, "sbatch", "echo slurm 24.05.1")
    _program(programs, "sinfo", "echo batch; echo debug")
    _program(programs, "srun", "echo '  --container-image=IMAGE'")
    _program(programs, "docker", "echo Docker version 27.1")
    _program(programs, "apptainer", "exit 1")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    found = {one.what: one for one in examine(tmp_path)}
    assert found["Slurm"].text == "slurm 24.05.1; partitions: batch, debug"
    assert found["pyxis"].level == "ok"
    assert found["docker"].text == "Docker version 27.1"
    assert found["apptainer"].level == "missing"


def test_a_gpu_that_torch_cannot_see_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    _program(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 550.54'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    found = {one.what: one for one in examine(tmp_path)}
    assert "H100" in found["GPUs"].text
    assert found["torch on GPUs"].level == "problem"


def test_a_program_that_hangs_or_a_probe_that_breaks_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path / "bin", "sbatch", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(doctor, "_containers", lambda: 1 / 0)
    found = examine(tmp_path)
    assert next(one for one in found if one.what == "Slurm").level == "missing"
    assert found[-1].level == "problem"
    assert "ZeroDivisionError" in found[-1].text


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("megatron-core", "0.10.0", True),
        ("megatron-core", "0.9.0", False),
        ("megatron-core", "0.19.2", True),
        ("megatron-core", "0.20.0rc0", False),
        ("torch", "2.14.1+cpu", True),
        ("torch", "2.5.1", False),
        ("python", "3.12.9", True),
        ("python", "3.13.0", False),
    ],
)
def test_versions_are_held_against_the_supported_ones(name: str, found: str, expected: bool) -> None:
    assert is_supported(name, found) is expected


def test_the_command_says_what_is_missing(tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    code, output = minitron("doctor", "--run-root", tmp_path, "--json")
    assert code == 0, output
    assert {"core", "gpu", "aligner"} <= {one["group"] for one in json.loads(output)}
    code, output = minitron("doctor", "--run-root", tmp_path, "--require", "slurm")
    assert code == 2
    assert "This machine lacks: Slurm" in output
    code, output = minitron("doctor", "--require", "quantum")
    assert code == 2
    assert "knows no quantum" in output


def test_the_supported_versions_are_those_of_the_package() -> None:
    text = (REPO / "pyproject.toml").read_text()
    assert f"megatron-core>={doctor.SUPPORTED['megatron-core'][0].removesuffix('.0')}" in text.replace(" ", "")
    assert f'requires-python = ">={doctor.SUPPORTED["python"][0]}' in text
