"""Findings of `minitron doctor` on this machine, and with other programs on the PATH."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from nemo_minitron import doctor
from nemo_minitron.doctor import examine, failures
from nemo_minitron.system.tested_versions import TESTED, level_of, release_numbers
from tests.conftest import REPO, Cli


def _program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_this_machine_meets_the_core_requirements(tmp_path: Path) -> None:
    found = examine(tmp_path / "not/there/yet")
    assert failures(found, []) == []
    by_name = {one.what: one for one in found}
    assert by_name["megatron-core"].level == "ok"
    assert "MiB/s" in by_name["disk"].text
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"


def test_programs_on_the_path_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    _program(programs, "sbatch", "echo slurm 24.05.1")
    _program(programs, "sinfo", "echo 'be nice'; echo 'debug|up|1:00|(null)|2'; echo 'batch|up|1:00:00|gpu:8|4'")
    _program(programs, "srun", "echo '  --container-image=IMAGE'")
    _program(programs, "docker", "echo Docker version 27.1")
    _program(programs, "apptainer", "exit 1")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    found = {one.what: one for one in examine(tmp_path)}
    assert found["Slurm"].text == "slurm 24.05.1; partitions: batch, debug"
    assert found["pyxis"].level == "ok"
    assert found["docker"].text == "Docker version 27.1"
    assert found["apptainer"].level == "missing"


def test_a_gpu_that_torch_cannot_use_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    _program(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 550.54'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    found = {one.what: one for one in examine(tmp_path)}
    assert "H100" in found["GPUs"].text
    assert found["torch on GPUs"].level == "problem"


def test_a_driver_that_does_not_work_is_not_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    _program(programs, "nvidia-smi", "echo Failed to initialize NVML: Driver/library version mismatch; echo; exit 18")
    _program(programs, "sbatch", "echo 'sbatch: fatal: cannot resolve slurmctld' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    found = {one.what: one for one in [*doctor._gpus(), *doctor._slurm()]}
    assert found["GPUs"].text == "nvidia-smi failed: Failed to initialize NVML: Driver/library version mismatch"
    assert found["Slurm"].text == "sbatch failed: sbatch: fatal: cannot resolve slurmctld"
    assert {one.level for one in found.values()} == {"missing"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [one.text for one in [*doctor._gpus(), *doctor._slurm()]] == [
        "no nvidia-smi: training runs on the CPU",
        "no sbatch here",
    ]


def test_megatron_on_the_import_path_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "megatron-core" else "1.0")
    found = next(one for one in doctor._core() if one.what == "megatron-core")
    assert found.level == "ok"
    assert "megatron/core (not an installed package" in found.text
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert next(one for one in doctor._core() if one.what == "megatron-core").level == "problem"


def test_the_python_of_the_aligner_image_needs_no_packages_of_the_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": "2.6.0a0", "megatron-core": "0.10.0", "transformers": "4.48.3"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    name = "nemo_minitron.backends.alignment.nemo_aligner.environment.is_installed_here"
    for is_image in (False, True):
        monkeypatch.setattr(name, lambda is_image=is_image: is_image)
        found = [one for one in [*doctor._core(), *doctor._aligner()] if one.group != "gpu-extras"]
        assert bool(failures(found, ["aligner"])) == (not is_image)
        assert [one.what for one in failures(found, ["core"])] == ["transformers"]


def test_lm_eval_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"lm-eval": "0.4.13"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    assert next(one for one in doctor._core() if one.what == "lm-eval").level == "ok"
    versions.clear()
    found = next(one for one in doctor._core() if one.what == "lm-eval")
    assert (found.group, found.level) == ("eval", "missing")
    assert "nemo-minitron[eval]" in found.next_step


def test_a_program_that_hangs_and_a_check_that_raises_are_findings(
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
        ("megatron-core", "0.10.0", "ok"),
        ("megatron-core", "0.9.0", "problem"),
        ("megatron-core", "0.16.1", "ok"),
        ("megatron-core", "0.19.9", "newer"),
        ("megatron-core", "0.20.0rc0", "newer"),
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.14.1", "ok"),
        ("torch", "2.5.1", "problem"),
        ("torch", "2.15.0a0+1a2b3c.nv26.10", "newer"),
        ("transformers", "4.52.4", "problem"),
        ("transformers", "5.25.0.dev0", "newer"),
        ("python", "3.13.9", "ok"),
        ("python", "3.14.0", "newer"),
        ("python", "3.9.18", "problem"),
    ],
)
def test_versions_are_compared_with_the_tested_ones(name: str, found: str, expected: str) -> None:
    assert level_of(name, found) == expected


def test_a_newer_version_is_a_warning_and_an_older_one_is_an_error(
    tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": "2.99.0", "megatron-core": "0.19.2", "transformers": "5.24.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    code, output = minitron("doctor", "--run-root", tmp_path, "--require", "core")
    assert code == 0, output
    assert "newer than tested" in output
    monkeypatch.setitem(versions, "megatron-core", "0.9.0")
    code, output = minitron("doctor", "--run-root", tmp_path)
    assert code == 2
    assert "too old" in output
    assert "This machine lacks: megatron-core" in output


def test_the_command_reports_missing_programs(tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    code, output = minitron("doctor", "--run-root", tmp_path, "--json")
    assert code == 0, output
    assert {"core", "gpu", "aligner"} <= {one["group"] for one in json.loads(output)}
    code, output = minitron("doctor", "--run-root", tmp_path, "--require", "slurm")
    assert code == 2
    assert "This machine lacks: Slurm" in output
    code, output = minitron("doctor", "--require", "quantum")
    assert code == 2
    assert "does not know quantum" in output


def test_the_oldest_versions_equal_those_in_pyproject() -> None:
    text = (REPO / "pyproject.toml").read_text()
    for name in ("torch", "megatron-core", "transformers"):
        assert f'"{name}>={TESTED[name][0]}' in text
    assert f'requires-python = ">={TESTED["python"][0]}' in text


def test_the_newest_versions_equal_the_pinned_ones() -> None:
    """The pinned versions are tested, so TESTED must include them."""
    pins = "".join((REPO / "constraints" / name).read_text() for name in ("newest.txt", "torch-newest.txt"))
    for name in ("torch", "megatron-core", "transformers"):
        found = [version for line, version in re.findall(rf"^({name})==(\S+)", pins, re.MULTILINE)]
        newest = max(found, key=release_numbers)
        assert level_of(name, newest) == "ok"
        assert newest.startswith(TESTED[name][1])
