"""Shared by all tests: quiet libraries, and the toy run that several files read."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_minitron.processes.gpu_environment import has_nvidia_driver

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not has_nvidia_driver():
    # Triton kernels run in its interpreter. It reads this when it is imported, which other libraries do, too.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Background jobs of a shell ignore Ctrl-C, and so would all processes that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # So do all processes below nohup with SIGHUP.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPO = Path(__file__).resolve().parents[1]
TOY = REPO / "recipes" / "toy" / "width.yaml"
Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def minitron(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Call the command line in this process: minitron("run", RECIPE, "key=value") -> (exit code, output)."""

    def call(*args: object) -> tuple[int, str]:
        from nemo_minitron.cli.main import main

        monkeypatch.setattr(sys, "argv", ["minitron", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run_root of one finished toy run, which is read only."""
    from nemo_minitron import api

    root = tmp_path_factory.mktemp("toy")
    api.run(api.load_recipe(TOY, [f"execution.run_root={root}"]), quiet=True)
    return root
