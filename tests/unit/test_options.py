"""Options of the commands: paths, combinations, and the command without arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.models import OptionInfo

from nemo_minitron.cli import status
from nemo_minitron.cli.arguments import expanded
from nemo_minitron.cli.main import make_app
from tests.conftest import TOY, Cli


def _path_options(app: typer.Typer) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of all commands that are options and hold one or several paths."""
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            for about in getattr(hint, "__metadata__", ()):
                if isinstance(about, OptionInfo) and "Path" in str(hint.__origin__):
                    yield f"{command.callback.__name__} {name}", about
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _path_options(group.typer_instance)


def test_every_option_that_is_a_path_expands_the_home_folder(
    tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict(_path_options(make_app()))
    assert {"bundle out", "fetch assets_dir", "make_aligner find_links", "doctor run_root"} <= set(found)
    assert [name for name, option in found.items() if option.callback is not expanded] == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded(["~/x", "y"]) == [tmp_path / "x", Path("y")]
    code, output = minitron("bundle", TOY, "--no-wheels", "--out=~/wheels")
    assert code == 2
    assert f"--out {tmp_path}/wheels: the file name of a bundle must be NAME.tar." in " ".join(output.split())


def test_an_unknown_home_folder_is_a_message(minitron: Cli) -> None:
    for words in (["check", "~nosuchuser/x.yaml"], ["doctor", "--run-root=~nosuchuser/x"]):
        code, output = minitron(*words)
        assert code == 2
        assert "~nosuchuser/x" in output
        assert "the home folder that ~ stands for is unknown" in output


def test_json_of_a_status_goes_with_a_page_and_with_repetition(
    tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["status", TOY, f"execution.run_root={tmp_path}", "--json", "--html", tmp_path / "status.html"]
    code, output = minitron(*words)
    assert code == 0, output
    assert json.loads(output)["stages"]["teacher"]["status"] == "to run"
    assert "0 of 16 stages have finished" in (tmp_path / "status.html").read_text()

    real, calls = status._status, []

    def finished_at_last(*args: Any, **keys: Any) -> tuple[dict[str, Any], dict[str, str]]:
        facts, environment = real(*args, **keys)
        calls.append(facts)
        for stage in facts["stages"].values():
            stage["status"] = "finished" if len(calls) == 3 else "to run"
        return facts, environment

    monkeypatch.setattr(status, "_status", finished_at_last)
    monkeypatch.setattr("time.sleep", lambda _: None)
    code, output = minitron(*words, "--watch", "1")
    assert code == 0, output
    assert [json.loads(line)["stages"]["teacher"]["status"] for line in output.splitlines()] == [
        "to run",
        "to run",
        "finished",
    ]


@pytest.mark.parametrize("words", [[], ["assets"]])
def test_a_command_without_arguments_prints_its_help_and_no_error(words: list[str], minitron: Cli) -> None:
    _, output = minitron(*words)
    assert "--help" in output
    assert output.count("Usage") == 1
    assert "error:" not in output
