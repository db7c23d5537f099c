"""The script install.sh of a bundle: recipes that wait for others, and the version of the installed program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nemo_minitron import __version__
from nemo_minitron.bundle.pack import pack
from nemo_minitron.system.progress import Progress
from tests.support.bundles import there, unpacked

TEACHER = {"kind": "import", "source": "asset:toy-llama"}
STAGES = {
    "first": {"teacher": TEACHER},
    "next": {"student": {"kind": "adopt", "path": "runs/first/teacher"}},
    "last": {"a": {"kind": "adopt", "path": "runs/next/student"}, "b": {"kind": "adopt", "path": "runs/first/teacher"}},
}


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an unpacked bundle, without wheels, of recipes that read each other's outputs."""
    monkeypatch.chdir(tmp_path)
    for name, stages in STAGES.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"stages": stages}))
    files, out = [Path(f"{name}.yaml") for name in STAGES], tmp_path / "b.tar"
    pack(files, [], out, Progress(silent=True), with_wheels=False, with_aligner=False, torch_index_url=None)
    return unpacked(out, tmp_path / "there")


def test_a_recipe_that_reads_outputs_of_another_is_not_checked_before_they_exist(bundle: Path) -> None:
    done = there(bundle, "./install.sh")
    assert done.returncode == 0, done.stderr
    assert "ok first: 1 stage" in done.stdout
    assert "not checked: recipes/next.yaml, which reads outputs of recipes/first.yaml\n" in done.stdout
    assert done.stdout.splitlines()[-4:] == [
        f"ready: cd {bundle}",
        "       minitron run recipes/first.yaml",
        "       minitron run recipes/next.yaml   # after recipes/first.yaml",
        "       minitron run recipes/last.yaml   # after recipes/first.yaml, recipes/next.yaml",
    ]


def test_a_bundle_without_wheels_needs_a_program_of_its_version(bundle: Path, tmp_path: Path) -> None:
    assert json.loads((bundle / "manifest.json").read_text())["nemo_minitron"] == __version__
    other = tmp_path / "bin/minitron"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho 0.0.9\n")
    other.chmod(0o755)
    done = there(bundle, "sh", "-c", f"PATH={other.parent}:$PATH ./install.sh")
    assert done.returncode == 2
    assert f"the bundle is of nemo-minitron {__version__}, and the minitron on the PATH is 0.0.9" in done.stderr
