"""Pins for an image with its own build of torch, and the pip steps of the Dockerfile without docker."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import REPO

OWN = (REPO / "constraints/newest.txt").read_text().splitlines()
NGC = """\
# as /etc/pip/constraint.txt of NVIDIA's images
packaging==23.2
typing-extensions==4.12.2  # exact
numpy==1.26.4
protobuf==5.29.4
torch==2.10.0a0+b4e4ee81d3.nv25.12
nvidia-dali-cuda130==1.52.0
transformer-engine @ file:///tmp/te.whl
/opt/pytorch/apex
--hash=sha256:00
""".splitlines()
OLD_IMAGE = {"numpy": "1.26.4", "scipy": "1.11.3", "pandas": "2.2.0", "protobuf": "4.24.4", "pillow": "10.3.0"}
"""Package versions of older images."""


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("image_pins", REPO / "constraints/image.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


image = _module()


def test_kept_packages_use_the_image_versions_and_others_our_pins() -> None:
    have = {"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "packaging": "23.2", "numpy": "1.26.4", "nvidia-cudnn": "9.1"}
    lines = [Requirement(line) for line in image.pins(OWN, NGC, have)]
    found = {line.name: str(line.specifier) for line in lines}
    assert found["torch"] == "==2.10.0a0+b4e4ee81d3.nv25.12"
    assert (found["numpy"], found["nvidia-cudnn"]) == ("==1.26.4", "==9.1")
    assert (found["protobuf"], found["nvidia-dali-cuda130"]) == ("==5.29.4", "==1.52.0"), "kept, though not installed"
    own = {line.name: line for line in image.requirements_of(OWN)}
    for name in ("packaging", "typing-extensions", "megatron-core", "transformers"):
        assert found[name] == str(own[name].specifier), "the image's pin of it is not ours"
    assert "tensorboard" not in found


def test_a_pin_incompatible_with_the_installed_torch_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        image, "requires", lambda name: ["setuptools<80", "sympy; extra == 'x'"] if name == "torch" else []
    )
    have = {"torch": "2.10", "setuptools": "78.1.0", "sympy": "1.13.0"}
    found = image.pins(["setuptools==84.2.1", "sympy==1.14.0"], [], have)
    assert found == ["setuptools==78.1.0", "sympy==1.14.0", "torch==2.10"]


def test_the_megatron_core_and_transformers_of_a_nemo_image_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = {"transformers": ["tokenizers<0.23,>=0.22", "safetensors<0.8"], "megatron-core": ["packaging>=24.2"]}
    monkeypatch.setattr(image, "requires", lambda name: wishes.get(name, []))
    own = ["megatron-core==0.19.2", "transformers==5.24.0", "tokenizers==0.23.3", "safetensors==0.8.0"]
    nemo = {"megatron-core": "0.18.0", "transformers": "5.8.1", "tokenizers": "0.22.2", "safetensors": "0.7.0"}
    assert image.pins(own, [], nemo) == sorted(f"{name}=={version}" for name, version in nemo.items())
    assert image.pins(own, [], {}) == sorted(own)


def test_pins_for_other_pythons_and_platforms_are_skipped() -> None:
    lines = ["a==1 ; python_version < '3'", "a==2 ; python_version >= '3'", "colorama==1 ; sys_platform == 'win32'"]
    assert image.pins(lines, [], {}) == ["a==2"]


def test_no_pinned_package_is_incompatible_with_image_packages() -> None:
    """Otherwise pip finds no solution in such an image. Incompatible packages must be in UNPINNED."""
    have = image.installed()
    if have["tensorboard"] not in (str(pin.specifier).removeprefix("==") for pin in image.requirements_of(OWN)):
        pytest.skip("asks the packages of constraints/newest.txt, which are not installed here")
    refusing = set()
    for pin in image.requirements_of(OWN):
        texts = image._requires(image.canonicalize_name(pin.name)) if pin.name in have else []
        for wish in map(Requirement, texts):
            holds = wish.marker is None or wish.marker.evaluate({"extra": ""})
            if holds and wish.name in OLD_IMAGE and not wish.specifier.contains(OLD_IMAGE[wish.name]):
                refusing.add(pin.name)
    assert refusing - set(OLD_IMAGE) <= set(image.UNPINNED)
    assert refusing, "else nothing need be left unpinned"


def test_a_changed_torch_or_incompatible_transformer_engine_stops_the_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish = ['transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"']
    monkeypatch.setattr(image, "requires", lambda name: wish)
    before, now = {"torch": "2.10", "numpy": "2"}, {"torch": "2.13", "megatron-core": "0.16.1", "numpy": "2"}
    assert list(image.problems(before, now)) == ["torch was 2.10 in the image and is 2.13 now"]
    assert list(image.problems({}, {**now, "transformer-engine": "2.10.0+769ed77"})) == []
    (text,) = image.problems({}, {**now, "transformer-engine": "2.14.0"})
    assert "choose another CORE_IMAGE" in text
    (tmp_path / "before.json").write_text(json.dumps({"torch": "0.1"}))
    assert image.main(["check", str(tmp_path / "before.json")]) == 1
    assert "torch was 0.1 in the image" in capsys.readouterr().err
    assert image.main(["kept", "packaging"]) == 0
    kept = json.loads(capsys.readouterr().out)
    assert {"torch", "packaging"} <= set(kept)
    (tmp_path / "before.json").write_text(json.dumps(kept))
    monkeypatch.setattr(image, "requires", lambda name: [])
    assert image.main(["check", str(tmp_path / "before.json")]) == 0


def _pip_steps(target: str, folder: Path) -> str:
    """Return the pip commands of a Dockerfile target, with this folder instead of the image's."""
    text = re.split(r"^FROM ", (REPO / "Dockerfile").read_text(), flags=re.MULTILINE)[
        1 + ("core", "aligner").index(target)
    ]
    runs = [run for run in re.findall(r"^RUN ((?:.*\\\n)*.*)$", text, re.MULTILINE) if "pip install" in run]
    script = "\n".join(runs).replace("/etc/pip/constraint.txt", str(folder / "constraint.txt"))
    return script.replace("/tmp/", f"{folder}/tmp/").replace(
        "pip install", "pip install --dry-run --report report.json"
    )


@pytest.mark.slow
def test_the_pip_steps_of_the_core_image_resolve_under_nvidias_constraints(
    tmp_path: Path,
) -> None:
    """A virtual environment with its own torch version and old packages takes the place of the image."""
    python = tmp_path / "image/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    version = image.installed()["torch"].split("+")[0]
    old = ["packaging==23.2", "typing-extensions==4.12.2", "numpy==1.26.4", "protobuf==5.29.4"]
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={version}", *old], check=True)
    (tmp_path / "constraint.txt").write_text("\n".join([*old, f"torch=={version}"]))
    copies = re.findall(r"^COPY (.*) \S+$", (REPO / "Dockerfile").read_text(), re.MULTILINE)
    for name in dict.fromkeys(" ".join(copies).split()):
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(REPO / name, tmp_path / name)
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": ""}

    def run(script: str, constraint: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env={**environment, "PIP_CONSTRAINT": constraint},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    plain = "pip install --dry-run -c constraints/newest.txt megatron-core"
    assert "ResolutionImpossible" in run(plain, str(tmp_path / "constraint.txt")).stderr, "what the steps are there for"
    assert 'ENV PIP_CONSTRAINT=""' in (REPO / "Dockerfile").read_text()
    steps = _pip_steps("core", tmp_path).partition("&& python -c")[0].rstrip().removesuffix("\\")
    done = run(steps, "")
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {one["metadata"]["name"].lower(): one["metadata"]["version"] for one in _report(tmp_path)}
    assert {"nemo-minitron", "transformers", "megatron-core"} <= set(wanted)
    assert not {"torch", "numpy", "protobuf"} & set(wanted), "the image's stay"
    assert Version(wanted["packaging"]) >= Version("24.2")


def _report(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "report.json").read_text())["install"])
