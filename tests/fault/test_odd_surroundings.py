"""Odd files, folders, streams and terminals: a message and code 2, never `unexpected error`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.artifacts.store import Store
from nemo_minitron.cli.chat import parse_attributes
from nemo_minitron.errors import ConfigError, EnvironmentProblem, MinitronError
from nemo_minitron.execution.runner import _published_names
from nemo_minitron.system.disk import disk_errors
from tests.conftest import TOY, Cli

RECIPES = {
    "binary.yaml": b"\x87\x00\xff\xfe" * 50,
    "empty.yaml": b"",
    "list.yaml": b"[1, 2]",
    "text.yaml": b"just text",
    "latin1.yaml": b"name: caf\xe9\n",
    "utf16.yaml": "stages: {}".encode("utf-16"),
    "recursive.yaml": b"a: &a [*a]",
    "deep.yaml": b"[" * 3000 + b"]" * 3000,
    "tab.yaml": b"stages:\n\tx: 1\n",
    "number_key.yaml": b"stages: {1: {kind: import, source: x}}\n1: 2\n",
    "defaults.yaml": b"defaults: 3\n",
    "twice.yaml": b"name: a\nname: b\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_that_is_no_recipe_is_refused(name: str, tmp_path: Path, minitron: Cli) -> None:
    (tmp_path / name).write_bytes(RECIPES[name])
    code, output = minitron("plan", tmp_path / name)
    assert (code, "error:" in output, "unexpected" in output, name in output) == (2, True, False, True), output


def test_a_path_that_is_no_file_is_refused(tmp_path: Path, minitron: Cli) -> None:
    (tmp_path / "broken.yaml").symlink_to("nowhere")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path in (tmp_path, tmp_path / "broken.yaml", tmp_path / "loop.yaml", tmp_path / ("x" * 300), "", "/dev/null"):
        code, output = minitron("check", path)
        assert (code, "unexpected" in output) == (2, False), output


def test_a_place_for_a_run_that_cannot_be_one_is_refused(tmp_path: Path, minitron: Cli) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for root in ("file", "broken/x", "loop/x", "x" * 300):
        code, output = minitron("run", TOY, f"execution.run_root={tmp_path / root}", "--until", "teacher")
        assert (code, "unexpected" in output) == (2, False), output


@pytest.mark.parametrize("contents", [b"{}", b"[]", b"x", b"\xff", b'{"done": 1}', b'{"fields": 1}'])
def test_a_damaged_small_file_of_a_run_is_reported_or_ignored(contents: bytes, tmp_path: Path, minitron: Cli) -> None:
    words = (TOY, f"execution.run_root={tmp_path}")
    for name in (".work/distill/progress.json", "launch/001/jobs.json", "plan.json"):
        file = tmp_path / "toy/width" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents)
        code, output = minitron("status", *words)
        assert (code in (0, 2), "unexpected" in output) == (True, False), output
        file.unlink()
    composed = tmp_path / "recipe.json"
    composed.write_bytes(contents)
    for path in (composed, tmp_path):
        code, output = minitron("stage", path, "teacher")
        assert (code, "unexpected" in output) == (2, False), output


def test_a_page_in_a_folder_that_does_not_exist_names_the_folder(tmp_path: Path, minitron: Cli) -> None:
    code, output = minitron("status", TOY, f"execution.run_root={tmp_path}", "--html", tmp_path / "no/page.html")
    assert (code, "The folder of this file does not exist" in output) == (2, True)


def _shell(line: str, folder: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, "M": f"{sys.executable} -m nemo_minitron", "R": str(TOY), **environment},
        capture_output=True,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def test_streams_may_be_closed_or_full(tmp_path: Path) -> None:
    lines = {
        "$M plan $R >&-": 0,
        "$M plan $R 2>&- >/dev/null": 0,
        "$M check $R <&-": 0,
        "$M plan nope 2>&-": 2,
        "$M plan $R >/dev/full": 2,
        "set -o pipefail; $M plan $R --json | head -1; [ $? -le 141 ]": 0,
    }
    for line, wanted in lines.items():
        code, output = _shell(line, tmp_path)
        assert (code, "unexpected" in output, "Traceback" in output) == (wanted, False, False), (line, output)
    assert not list(tmp_path.iterdir())


def test_a_terminal_with_ascii_only_gets_escapes(tmp_path: Path) -> None:
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii", "COLUMNS": "1"}
    code, output = _shell('$M plan $R "stages.teacher.source=/données/模型"', tmp_path, **old)
    assert (code, "there is no such file or folder" in output, "Error" in output) == (0, True, False), output


def test_a_folder_that_was_deleted_meanwhile_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code, output = _shell('rmdir "$PWD"; $M plan $R', gone)
    assert (code, "has been deleted" in output, "unexpected" in output) == (2, True, False), output


def test_errors_name_the_published_folder_of_a_stage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for error in (OSError(28, "No space left", "x"), ConfigError("x"), ValueError("x")):
        with (  # noqa: PT012
            pytest.raises(type(error) if isinstance(error, ValueError) else MinitronError) as found,
            store.building("score") as out,
            _published_names(out, "score", store),
        ):
            if isinstance(error, OSError):
                error.filename = str(out / "scores.json")
            elif isinstance(error, ConfigError):
                raise ConfigError(f"{out}/a", where=str(out / "b"), allowed=f"{out.absolute()}", next_step=out.name)
            raise error
        assert ".partial" not in str(found.value)
        if isinstance(found.value, ConfigError):
            assert (found.value.where, found.value.next_step) == (str(tmp_path / "score/b"), "score")
            assert str(found.value) == str(
                ConfigError(
                    f"{tmp_path}/score/a", where=f"{tmp_path}/score/b", allowed=f"{tmp_path}/score", next_step="score"
                )
            )


@pytest.mark.parametrize("code", [36, 40, 21, 17, 24, 23, 26, 16])
def test_what_a_file_system_refuses_is_a_message(code: int, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="where: x"), disk_errors(tmp_path):
        raise OSError(code, os.strerror(code), "x")


@pytest.mark.parametrize("text", ["helpfulness=²", "helpfulness=", "helpfulness=1.2.3", "helpfulness=nan", "=1", "x"])
def test_an_attribute_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="value from 0 to 4"):
        parse_attributes(text)


def test_rates_that_no_optimizer_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match="adam_beta1"):
        load_recipe(TOY, ["stages.distill.adam_beta1=1.0"])
