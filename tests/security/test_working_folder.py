"""No process of a run imports files in the working folder that have the names of modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.backends.alignment.nemo_aligner import environment
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.processes.nodes import Nodes
from nemo_minitron.processes.same_code import START
from tests.conftest import REPO

NAMES = (
    "abc", "argparse", "contextlib", "datetime", "importlib", "json", "multiprocessing", "pathlib", "pickle", "random",
    "runpy", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "torch", "types", "typing", "yaml",
)  # fmt: skip
EXEMPT = {"nemo_minitron/doctor.py", "nemo_minitron/backends/alignment/nemo_aligner/environment.py"}
"""Programs whose `-c` code removes the working folder from the path first, or imports nothing."""

TOKENIZATION = """
import os
import sys
from pathlib import Path

from nemo_minitron.schema.data import DataSource
from nemo_minitron.data.pieces import Piece
from nemo_minitron.data.shard_pool import WorkerSettings, shard_workers
from nemo_minitron.data.shards import ShardFolder, Task
from nemo_minitron.data.tokenization import DocumentTokenizer

if __name__ == "__main__":
    shards, model = sys.argv[1:]
    text = Path(shards).with_name("text.txt")
    text.write_text("What two processes read.")
    source = DataSource(source=str(text))
    work = WorkerSettings(ShardFolder(Path(shards), ""), DocumentTokenizer.load(Path(model), 512), "uint16", model)
    with shard_workers(work, 2, lambda: None) as workers:
        shard = workers.submit(Task("a", Piece((text,), 24), source, None)).result()
    print(shard.num_documents, os.environ.get("PYTHONSAFEPATH"))
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder; every module that is imported from it leaves a file there."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path


def _has_run(folder: Path) -> str:
    return (folder / "ran").read_text() if (folder / "ran").is_file() else ""


def test_the_files_would_run_otherwise(hostile: Path) -> None:
    subprocess.run([sys.executable, "-c", "import datetime"], check=True)
    assert _has_run(hostile) == "datetime "


def test_an_agent_and_its_ranks(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("script")
    (script / "__main__.py").write_text("import datetime, json, multiprocessing, pathlib, runpy, socket, typing")
    # PYTHONSAFEPATH is not set, because Python 3.10 ignores it.
    done = subprocess.run(Nodes().command(sys.executable, 2, [str(script)]), check=False)
    assert (done.returncode, _has_run(hostile)) == (0, "")


@pytest.mark.parametrize("what", ["worker", pytest.param("probe", marks=pytest.mark.slow)])
def test_a_rank_and_the_process_that_compares_models(what: str, hostile: Path) -> None:
    """The processes end at a missing file, after they have imported everything."""
    words = [sys.executable, str(START), what, "nosuch.json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "nosuch.json" in done.stderr
    assert _has_run(hostile) == ""


def test_the_search_for_gpu_kernels(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SAFE_PATH", {})
    environment.has_gpu_kernels.__wrapped__(Path(sys.executable))
    assert _has_run(hostile) == ""


def test_processes_of_tokenization(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """This runs in a separate process, which has started nothing yet."""
    folder = tmp_path_factory.mktemp("tokenization")
    (folder / "script.py").write_text(TOKENIZATION)
    words = [sys.executable, str(folder / "script.py"), str(folder / "shards"), BUILT_IN["toy-llama"]]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr, _has_run(hostile)) == (0, "1 None\n", "", "")


def test_no_process_is_started_with_the_working_folder_on_its_path() -> None:
    """`python -m` and `python -c` put the working folder first on the path; `-I` does not."""
    found = {
        str(file.relative_to(REPO))
        for file in (REPO / "nemo_minitron").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.List)
        and any(isinstance(word, ast.Constant) and word.value in ("-m", "-c") for word in node.elts)
        and not any(isinstance(word, ast.Constant) and word.value == "-I" for word in node.elts)
        and any("python" in ast.unparse(word).lower() or "executable" in ast.unparse(word) for word in node.elts)
    }
    assert found <= EXEMPT
