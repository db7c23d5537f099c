"""Tests of the wheels of a bundle, without a network: caching, and errors of pip."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import pytest

from nemo_minitron import __version__
from nemo_minitron.backends.alignment.nemo_aligner import environment
from nemo_minitron.bundle import wheels
from nemo_minitron.bundle.pack import wheel_items
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.progress import Progress
from tests.unit.test_assets import make_wheel

SILENT = Progress(silent=True)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a local package index, the only one that pip may use."""
    make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "index"


def kept(wanted: str = "tiny-asset==1.0", pins: str = "") -> list[str]:
    def fill(folder: Path, scratch: Path) -> None:
        wheels._pip_wheel(folder, [wanted], scratch, SILENT)

    return [file.name for file in wheels._cached("tiny", [pins], fill, SILENT).iterdir()]


def test_wheels_are_collected_once_and_again_when_the_pins_change(index: Path) -> None:
    assert kept() == ["tiny_asset-1.0-py3-none-any.whl"]
    (index / "tiny_asset-1.0-py3-none-any.whl").unlink()
    assert kept() == ["tiny_asset-1.0-py3-none-any.whl"]
    with pytest.raises(EnvironmentProblem):
        kept(pins="other")


def test_a_package_without_a_file_is_named_and_leaves_no_cache(index: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"pip finds no file of tiny-asset==2\.0 for \w+ \w+, Python 3\.\d+"):
        kept("tiny-asset==2.0")
    assert list((tmp_path / "cache").rglob("*.whl")) == []
    assert list((tmp_path / "cache/nemo-minitron").iterdir()) == []


def test_another_failure_of_pip_is_quoted(index: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"pip could not build the wheels: .*nowhere"):
        kept("/nowhere/at/all")


def test_unexpected_wheels_give_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "version", lambda _: "2.13.0+cpu")
    files = [Path("torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"), Path("odd-1.0-cp311-cp311-linux_x86_64.whl")]
    compiled, torch = wheels.warnings_about(files)
    assert "odd-1.0-cp311-cp311-linux_x86_64.whl was compiled here" in compiled
    assert "torch is 2.13.0+cpu here and 2.13.0 in the bundle" in torch
    assert not list(wheels.warnings_about([Path("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl")]))


def test_every_wheel_of_a_bundle_is_listed_with_its_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wheel(name: str) -> Path:
        file = tmp_path / f"{name}-py3-none-any.whl"
        file.write_text(name)
        return file

    core = [
        wheel(name) for name in ("numpy-2.4.6", "typing_extensions-4.16.0", "torch-2.13.0+cpu", "setuptools-84.2.1")
    ]
    aligner = [wheel("numpy-1.26.4"), core[1]]
    monkeypatch.setattr(wheels, "core_wheels", lambda *_: core)
    monkeypatch.setattr(wheels, "aligner_wheels", lambda _: aligner)
    with ExitStack() as stack:
        items, facts, _ = wheel_items(None, stack, SILENT, with_aligner=True)
    found = {item.member: item.content for item in items}
    lists = {name: found.pop(f"wheels/{name}/requirements.txt") for name in ("core", "aligner")}
    assert {name.split("/")[1] for name in found if "numpy-1" in name or "typing" in name} == {"core", "aligner"}
    assert "wheels/aligner/typing_extensions-4.16.0-py3-none-any.whl" not in found, "it is with the core's"
    pins = {name: [line.split()[0] for line in bytes(text).decode().splitlines()] for name, text in lists.items()}  # type: ignore[arg-type]
    assert pins["core"] == [
        f"nemo_minitron=={__version__}",
        "numpy==2.4.6",
        "setuptools==84.2.1",
        "torch==2.13.0+cpu",
        "typing_extensions==4.16.0",
    ]
    assert pins["aligner"] == ["numpy==1.26.4", *pins["core"][2:]]
    digest = hashlib.sha256(b"torch-2.13.0+cpu").hexdigest()
    assert f"torch==2.13.0+cpu --hash=sha256:{digest}\n".encode() in bytes(lists["aligner"])  # type: ignore[arg-type]
    assert facts["core"].keys() >= {"torch", "nemo_minitron"}


def test_the_aligner_environment_uses_only_the_given_folders(index: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="/nowhere: no such folder"):
        environment.make_environment(SILENT, find_links=[Path("/nowhere")])
    wheel = index / "tiny_asset-1.0-py3-none-any.whl"
    (tmp_path / "my wheels").mkdir()
    wheel.rename(tmp_path / "my wheels" / wheel.name)
    with pytest.raises(EnvironmentProblem, match=r"torch==.* ended with code 1") as error:
        environment.make_environment(
            SILENT, find_links=[tmp_path / "my wheels"], torch_index_url="https://index.invalid"
        )
    output = Path(str(error.value.where)).read_text()
    assert "my wheels" in output
    assert "index.invalid" not in output
