"""The installed package without its checkout: its files, its plans, its runs, and the code that they import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_minitron import __version__
from nemo_minitron.backends.alignment.nemo_aligner.environment import SUPPORTED_ALIGNER
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from nemo_minitron.config.compose import compose
from nemo_minitron.config.explain import validate
from nemo_minitron.execution.ranks import load_error
from nemo_minitron.plan.planner import make_plan
from nemo_minitron.processes.nodes import RUNNER_VARIABLE, free_port
from nemo_minitron.processes.same_code import START
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.places import shipped_recipes
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO
from tests.support.aligner import require_aligner
from tests.support.wheel import copy_of_the_sources, make_sdist, make_wheel, must, venv_with

PLANS = """
import json, sys
from pathlib import Path
import nemo_minitron
from nemo_minitron.config.compose import compose
from nemo_minitron.config.explain import validate
from nemo_minitron.system.places import shipped_recipes
from nemo_minitron.plan.planner import make_plan
plans = {}
for name in shipped_recipes():
    composed = compose(Path(name))
    calls = make_plan(validate(composed, where=name)).calls
    plans[name] = [composed, [[call.name, call.fingerprint] for call in calls]]
print(json.dumps([nemo_minitron.__file__, plans]))
"""
PACK = """
import sys
from pathlib import Path
from nemo_minitron.bundle.own_wheel import write_own_wheel
write_own_wheel(Path(sys.argv[1]))
"""
COMPARED = ("template", "toy/aligned", "toy/search", "smollm2_135m/iterative")
"""Recipes of different kinds: the files are the same, so that one of a kind shows whether they are found alike."""
FAKES = ("nemo_minitron/__init__", "torch", "yaml", "omegaconf", "tokenizers", "numpy", "random", "types", "tempfile")
"""Files that a working folder may contain by chance; none of them may be imported."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package as for PyPI: first a source archive, then a wheel from it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "source").mkdir()
    return make_wheel(make_sdist(copy_of_the_sources(folder / "source"), folder / "sdist"), folder / "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment with the wheel."""
    return venv_with(tmp_path_factory.mktemp("installed") / "venv", str(wheel))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Return a working folder with spaces in its name, and with files that have the names of packages."""
    folder = tmp_path / "a working folder"
    for name in FAKES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(f"raise SystemExit('imported from the working folder: {name}')\n")
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    shipped = "nemo_minitron/_shipped/"
    places = {"nemo_minitron": "", "configs": shipped, "constraints": shipped, "recipes": shipped}
    wanted = {
        inside + path.relative_to(REPO).as_posix(): path
        for folder, inside in places.items()
        for path in (REPO / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == wanted.keys()
    assert all(archive.read(name) == path.read_bytes() for name, path in wanted.items())
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_is_packed_again_from_what_it_installed(
    wheel: Path, installed: Path, elsewhere: Path, tmp_path: Path
) -> None:
    """This is what `minitron bundle` does without a checkout."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/pack.py").write_text(PACK)
    must([str(installed / "python"), str(tmp_path / "scripts/pack.py"), str(tmp_path)], cwd=elsewhere)
    first, again = zipfile.ZipFile(wheel), zipfile.ZipFile(tmp_path / wheel.name)
    assert again.testzip() is None
    by_pip = {name for name in first.namelist() if name.endswith(("/WHEEL", "/RECORD", "/top_level.txt"))}
    for name in set(first.namelist()) - by_pip:
        assert again.read(name) == first.read(name), name
    assert set(again.namelist()) <= set(first.namelist())


def test_every_shipped_recipe_is_planned_from_the_wheel_and_as_from_the_checkout(
    installed: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/plans.py").write_text(PLANS)
    # Assets that have been fetched into the checkout are part of a plan's fingerprints.
    monkeypatch.chdir(tmp_path)
    output = must([str(installed / "python"), str(tmp_path / "scripts/plans.py")], cwd=elsewhere)
    file, plans = json.loads(output)
    assert Path(file).is_relative_to(installed.parent)
    assert list(plans) == shipped_recipes()
    for name in COMPARED:
        composed, calls = plans[name]
        here = compose(REPO / "recipes" / f"{name}.yaml")
        assert composed == here, name
        assert calls == [[call.name, call.fingerprint] for call in make_plan(validate(here, where=name)).calls], name


def test_the_commands_know_the_shipped_recipes_and_a_file_of_the_user_goes_first(
    installed: Path, elsewhere: Path
) -> None:
    minitron = str(installed / "minitron")
    assert "toy/width" in must([minitron, "recipes"], cwd=elsewhere)
    for name in ("toy/width", "recipes/toy/width.yaml"):
        assert "ok toy/width" in must([minitron, "check", name], cwd=elsewhere)
    own = elsewhere / "recipes/toy/width.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\ndefaults: [toy/width, _self_]\n")
    assert "ok mine" in must([minitron, "check", "toy/width"], cwd=elsewhere)


@pytest.mark.slow
def test_an_editable_install_reads_the_folders_of_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "checkout"
    source.mkdir()
    copy_of_the_sources(source)
    bin_folder = venv_with(tmp_path / "venv", "--editable", str(source))
    (source / "recipes/new.yaml").write_text("defaults: [toy/width, _self_]\n")
    assert "ok new" in must([str(bin_folder / "minitron"), "check", "new"], cwd=tmp_path)


# --- which code is imported ------------------------------------------------------------------------------


def test_an_agent_and_its_ranks_import_nothing_from_the_working_folder(elsewhere: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.mkdir()
    (script / "__main__.py").write_text(
        "import json, os, sys, torch, yaml\nprint(json.dumps([os.getcwd(), sys.path]))\n"
    )
    # PYTHONSAFEPATH is not set, because Python 3.10 ignores it.
    where = ["--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    words = [sys.executable, str(START), "torch.distributed.run", *where, "--nproc-per-node=1", str(script)]
    cwd, path = json.loads(must(words, cwd=elsewhere))
    assert cwd == str(elsewhere)
    assert not {cwd, ""} & set(path)


def test_a_rank_has_the_code_of_its_runner_and_refuses_another(installed: Path, elsewhere: Path) -> None:
    start = next(installed.parent.glob("lib/python*/site-packages/nemo_minitron/start"))
    order = {"code": {"version": "0.0.9", "package": "/opt/other/nemo_minitron"}}
    (elsewhere / "call.json").write_text(json.dumps(order))
    # This Python has the checkout's package installed; the file that is started belongs to the wheel.
    words = [sys.executable, str(start), "worker", str(elsewhere / "call.json")]
    variables = {**os.environ, RUNNER_VARIABLE: str(os.getpid())}
    done = subprocess.run(words, cwd=elsewhere, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    error = load_error(elsewhere)
    assert error is not None
    assert f"The runner has nemo-minitron 0.0.9 and a rank has {__version__}." in str(error)
    assert f"runner: /opt/other/nemo_minitron; rank: {start.parent}" in str(error)


# --- for make test-all ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_toy_recipe_runs_to_its_report_from_the_wheel(installed: Path, elsewhere: Path) -> None:
    """Run with ranks and tokenization workers in a folder none of whose files may be imported."""
    words = ["run", "toy/width", "execution.parallel.tp=2", "execution.workers=2"]
    must([str(installed / "minitron"), *words], cwd=elsewhere)
    report = json.loads((elsewhere / "runs/toy/width/report.json").read_text())
    assert report["models"].keys() >= {"teacher", "pruned", "distilled"}
    made_by = json.loads((elsewhere / "runs/toy/width/distill/manifest.json").read_text())["provenance"]
    assert made_by["git_commit"] is None


@pytest.mark.slow
def test_a_task_of_nemo_aligner_imports_nothing_from_the_working_folder(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_aligner()
    for name in ("nemo/__init__", "lightning/__init__", "task", "cpu", "json", "self_test"):
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / f"{name}.py").write_text(f"raise SystemExit('imported from the working folder: {name}')\n")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))  # it is for this package's Python, and is not passed on
    log = tmp_path / "task.log"
    found = run_task("self_test", {}, tmp_path / "work", log, Progress(silent=True), StopRequest())
    assert found["versions"]["nemo-aligner"].startswith(SUPPORTED_ALIGNER)
    assert "imported from the working folder" not in log.read_text()


@pytest.mark.slow
def test_every_method_of_nemo_aligner_starts_from_the_wheel(installed: Path, elsewhere: Path, tmp_path: Path) -> None:
    """Run the tests of its trainings in the environment with the wheel, without a checkout."""
    require_aligner()
    shutil.copytree(REPO / "tests", tmp_path / "only tests/tests", ignore=shutil.ignore_patterns("__pycache__"))
    chosen = "(loss_goes_down and (dpo or regression or sft)) or likeliest or learns_the_teacher or moves_towards"
    files = [f"tests/aligner/test_{name}.py" for name in ("training", "distillation", "steerlm2")]
    words = [str(installed / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    output = must(words, cwd=tmp_path / "only tests", MINITRON_REQUIRE_ALIGNER="1")
    assert " passed" in output
    assert "skipped" not in output
    again = [str(installed / "minitron"), "env", "has-aligner"]
    must(again, cwd=elsewhere)
