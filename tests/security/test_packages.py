"""Tests of foreign packages: pins with hashes, manipulated bundles, and configs that would fetch code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nemo_minitron
from nemo_minitron.backends.alignment.nemo_aligner import environment
from nemo_minitron.bundle import wheels
from nemo_minitron.bundle.archive import write_archive
from nemo_minitron.bundle.items import Item
from nemo_minitron.bundle.own_wheel import write_own_wheel
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.families import read_shape
from nemo_minitron.families.hf_config import write_config
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO
from tests.support.bundles import INSTALL, there, unpacked
from tests.unit.test_assets import make_wheel

SILENT = Progress(silent=True)
PIN = re.compile(r"^([A-Za-z0-9._-]+==[^ \\]+)(?: ; (.*?))?(?: \\)?$")
MARKER = "import pathlib\npathlib.Path('/').joinpath(*{parts!r}).touch()\n"


def pins(*files: Path) -> set[tuple[str, str]]:
    """Return (NAME==VERSION, marker) of the lines that are pins."""
    found = [PIN.match(line) for file in files for line in file.read_text().splitlines()]
    return {(re.sub(r"[-_.]+(?=.*==)", "-", match[1]).lower(), match[2] or "") for match in found if match}


def test_every_pin_has_hashes_and_the_lock_files_follow_the_pins() -> None:
    folder = REPO / "constraints"
    core = [folder / f"{name}.lock" for name in ("build", "newest", "dev")]
    assert pins(*core) == pins(folder / "newest.txt"), "make lock"
    assert pins(folder / "oldest.lock") == pins(folder / "oldest.txt"), "make lock"
    assert pins(environment.LOCK) == pins(environment.REQUIREMENTS), "make lock"
    for file in (*core, folder / "oldest.lock", environment.LOCK):
        for entry in re.split(r"^(?=[A-Za-z0-9])", file.read_text(), flags=re.MULTILINE)[1:]:
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_make_and_nemo_aligners_environment_install_nothing_without_a_hash_but_torch() -> None:
    installs = re.findall(r"\$\(PIP\) (.*)", (REPO / "Makefile").read_text())
    unhashed = [line for line in installs if "$(HASHED)" not in line]
    assert [line.split()[-1] for line in unhashed] == ["$(TORCH)", "."]
    assert all("-c $(CONSTRAINTS)" in line or "--no-deps --no-build-isolation" in line for line in unhashed)
    *hashed, (_, torch) = environment._installations(Path("python"), None, ())
    assert len(hashed) == 2
    assert all({"--require-hashes", "--no-deps"} <= set(words) for _, words in hashed)
    assert torch[-1] == environment.torch_requirement()
    assert "-c" in torch


# --- bundles --------------------------------------------------------------------------------------


def _bundle(root: Path) -> Path:
    """Create and unpack a bundle of one wheel, for this machine and without recipes."""
    make_wheel(root / "made")
    (wheel,) = (root / "made").iterdir()
    listed = Item("wheels/core/requirements.txt", wheels.list_of([wheel]), "list")
    script = Item("install.sh", INSTALL.read_bytes(), "script")
    items = [script, listed, Item(f"wheels/core/{wheel.name}", wheel, "wheel")]
    write_archive(root / "mine.tar", items, {"recipes": [], "target": wheels.target()}, SILENT)
    return unpacked(root / "mine.tar", root / "there")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return _bundle(tmp_path)


def install(bundle: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return there(bundle, "env", f"PYTHON={sys.executable}", "./install.sh", *words)


@pytest.mark.parametrize("name", ["json.py", "wheels/core/evil-1.0-py3-none-any.whl", "runs/x/.work/a", ".hidden"])
def test_a_file_that_is_not_part_of_the_bundle_is_refused(bundle: Path, name: str) -> None:
    assert install(bundle, "--verify").returncode == 0
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("")
    for words in (["--verify"], []):
        done = install(bundle, *words)
        assert done.returncode == 2
        assert name in done.stderr
        assert "--accept-unlisted" in done.stderr
    assert not (bundle / ".venv").exists()
    assert install(bundle, "--verify", "--accept-unlisted").returncode == 0


def test_links_in_place_of_files_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json").rename(tmp_path / "manifest.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert "files of the bundle were replaced by links" in install(bundle, "--verify", "--accept-unlisted").stderr
    (bundle / "manifest.json").unlink()
    (tmp_path / "manifest.json").rename(bundle / "manifest.json")
    (bundle / "wheels").rename(tmp_path / "wheels")
    (bundle / "wheels").symlink_to(tmp_path / "wheels")
    assert "files of the bundle were replaced by links" in install(bundle, "--accept-unlisted").stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Install a bundle with added hostile files; return it with the output."""
    root = tmp_path_factory.mktemp("installed")
    bundle = _bundle(root)
    for name in ("json", "platform", "os", "venv", "ensurepip", "pip", "shlex"):
        (bundle / f"{name}.py").write_text(MARKER.format(parts=(root / "it ran").parts[1:]))
    with zipfile.ZipFile(bundle / "wheels/core/evil-1.0-py3-none-any.whl", "w") as evil:
        info = "evil-1.0.dist-info"
        evil.writestr("evil.py", "")
        evil.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
        evil.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        evil.writestr(f"{info}/RECORD", "")
    done = install(bundle, "--accept-unlisted")
    return bundle, done.stdout + done.stderr


def test_nothing_in_the_bundles_folder_is_imported_and_only_listed_wheels_are_installed(
    installed: tuple[Path, str],
) -> None:
    bundle, output = installed
    assert "ready: cd" in output
    assert not (bundle.parent.parent / "it ran").exists()
    (site,) = bundle.glob(".venv/lib/python*/site-packages")
    assert not (site / "evil.py").exists()
    assert list(site.glob("tiny_asset-1.0.dist-info"))


def test_a_wheel_with_other_bytes_is_refused_even_with_new_checksums(
    bundle: Path, installed: tuple[Path, str], tmp_path: Path
) -> None:
    wheel = next(bundle.glob("wheels/core/*.whl"))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more.py", "")
    _write_sums(bundle)
    # Copy a virtual environment, because creating one takes longer than everything else here.
    python, made = tmp_path / "python", shlex.quote(str(installed[0] / ".venv"))
    copy = f'if [ "$*" = "-I -m venv --clear .venv" ]; then cp -a {made} .venv; rm -r .venv/lib/*/*/tiny_*; exit; fi'
    python.write_text(f'#!/bin/sh\n{copy}\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    done = there(bundle, "env", f"PYTHON={python}", "./install.sh")
    assert done.returncode == 2
    assert (bundle / ".venv").is_dir()
    assert "DO NOT MATCH THE HASHES" in done.stderr


def _write_sums(bundle: Path) -> None:
    """Rewrite the checksums, as an attacker who changes a bundle would."""
    names = [line.split("  ", 1)[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()]
    sums = subprocess.run(["sha256sum", *names], cwd=bundle, capture_output=True, text=True, check=True).stdout
    (bundle / "SHA256SUMS").write_text(sums)


NO_SUM = "0" * 64
LISTS = {
    "a device": f"{NO_SUM}  /dev/zero\n",
    "a file elsewhere": f"{NO_SUM}  ../../etc/passwd\n",
    "the terminal": f"{NO_SUM}  -\n",
    "another form": f"SHA256 (manifest.json) = {NO_SUM}\n",
    "binary": f"{NO_SUM} *manifest.json\n",
    "no end": f"{NO_SUM}  manifest.json",
    "nothing": "",
}


@pytest.mark.parametrize("lines", LISTS.values(), ids=LISTS.keys())
def test_a_list_that_names_other_things_than_files_of_the_bundle_is_refused_unread(bundle: Path, lines: str) -> None:
    (bundle / "SHA256SUMS").write_text(lines)
    done = subprocess.run(
        ["./install.sh", "--verify"], cwd=bundle, stdin=subprocess.PIPE, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: SHA256SUMS is damaged")
    assert "Traceback" not in done.stderr


def test_a_pipe_in_place_of_a_file_is_refused_unread(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    assert "not regular files\n  manifest.json" in install(bundle, "--verify").stderr


MANIFESTS = [
    "[" * 100_000,
    "[]",
    '{"recipes": 1}',
    '{"recipes": [{"file": "a\\nb"}]}',
    '{"recipes": [{"file": "--help"}]}',
    '{"recipes": [{"file": ["x"]}]}',
    '{"recipes": [{"file": "\\ud800"}]}',
    '{"recipes": [], "target": {"system": "\\u001b]52;c;x"}}',
    '{"recipes": [], "target": 1}',
]


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_damaged_manifest_is_reported(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    _write_sums(bundle)
    done = install(bundle)
    assert done.returncode == 2
    assert done.stderr.startswith("error: manifest.json is damaged")
    assert done.stderr.isascii()
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


def test_pip_imports_nothing_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "it ran"
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pip", "json", "venv"):
        (here / f"{name}.py").write_text(MARKER.format(parts=marker.parts[1:]))
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EnvironmentProblem, match="pip finds no file of"):
        wheels._pip_wheel(tmp_path / "wheels", ["no-such-package==1"], tmp_path, SILENT)
    for _, words in environment._installations(Path(sys.executable), None, [tmp_path]):
        assert words[1:4] == ["-I", "-m", "pip"]
    assert not marker.exists()


# --- the package's own wheel ----------------------------------------------------------------------


def test_the_own_wheel_needs_no_build_and_is_whole(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    wheel, again = write_own_wheel(tmp_path / "a"), write_own_wheel(tmp_path / "b")
    assert wheel.read_bytes() == again.read_bytes()
    site = tmp_path / "site"
    words = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", f"--target={site}", str(wheel)]
    subprocess.run([sys.executable, *words], check=True)
    code = (
        "import nemo_minitron, json; from importlib.metadata import distribution as d;"
        "from nemo_minitron.system.places import shipped_dir, shipped_recipes;"
        "print(json.dumps([nemo_minitron.__file__, d('nemo-minitron').version, len(d('nemo-minitron').requires),"
        "len(shipped_recipes()), (shipped_dir('constraints') / 'newest.lock').is_file()]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    file, version, requires, recipes, has_lock = json.loads(done.stdout)
    assert Path(file).is_relative_to(site)
    assert version == nemo_minitron.__version__
    assert requires > 20
    assert recipes > 5
    assert has_lock


# --- configs --------------------------------------------------------------------------------------


def test_no_key_by_which_transformers_fetches_code_gets_into_a_published_config() -> None:
    """CVE-2026-4372: such a key in config.json runs code from the hub, even with trust_remote_code=False."""
    config = json.loads((REPO / "nemo_minitron/toy/model/config.json").read_text())
    hostile = {
        "_attn_implementation_internal": "evil/kernels:run",
        "_attn_implementation": "evil/kernels:run",
        "attn_implementation": "evil/kernels:run",
        "auto_map": {"AutoModelForCausalLM": "evil--modeling.Evil"},
        "custom_pipelines": {"x": {"impl": "evil.Evil"}},
        "use_kernels": True,
        "rope_theta": config.get("rope_theta", 10000.0),
    }
    written = write_config({**config, **hostile}, read_shape(config))
    assert written.keys() & hostile.keys() == {"rope_theta"}
    assert "evil" not in json.dumps(written)
