"""Text of other people reaches a terminal as text: no escape sequence, no markup."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.artifacts.manifest import Manifest, write_manifest
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.processes.nodes import Nodes
from nemo_minitron.system.terminal import Screen, visible, write
from tests.conftest import REPO, TOY, Cli
from tests.support.tiny_models import tiny_model_dir

CLIPBOARD = "\x1b]52;c;ZXZpbA==\x07"
HOSTILE = f"[/INST] [/red] [bold] :smile: {CLIPBOARD} \x9b31m \u202etxt.exe \r\x08 end"
SHOWN = "[/INST] [/red] [bold] :smile: \\x1b]52;c;ZXZpbA==\\x07 \\x9b31m \\u202etxt.exe \\r\\x08 end"


def _is_harmless(text: str) -> bool:
    return not any(sign in text for sign in "\x1b\x07\x9b\x08\u202e") and "\r" not in text


def test_what_cannot_be_seen_is_written_as_an_escape() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible(visible(HOSTILE)) == SHOWN
    assert visible("a\tb\nc\r\nd \x1b[1;31mred\x1b[0m é 模型 👩‍💻 می‌خواهم") == "a\tb\nc\nd red é 模型 👩‍💻 می‌خواهم"
    assert visible("\ud800\U000e0041\x00\x7f\u2028") == "\\ud800\\U000e0041\\x00\\x7f\\u2028"


def test_control_sequences_in_an_answer_are_shown_and_not_executed(capsys: pytest.CaptureFixture[str]) -> None:
    for piece in ("hi ", "\x1b", "]52;c;ZXZpbA==", "\x07"):
        write(piece, end="")
    assert capsys.readouterr().out == "hi \\x1b]52;c;ZXZpbA==\\x07"


def test_prompts_in_brackets_are_planned_and_shown(minitron: Cli, tmp_path: Path) -> None:
    """The reason why a stage would run again contains the prompts of the recipe."""
    root = f"execution.run_root={tmp_path}"
    plan = load_plan(TOY, [root])
    call = plan.call("evaluate_teacher")
    params = {**call.payload["params"], "prompts": ["another"]}
    folder = tmp_path / "toy/width/evaluate_teacher"
    folder.mkdir(parents=True)
    facts = {"inputs": call.inputs, "result": {}, "provenance": {"wall_s": 1.0}}
    old = Manifest("toy/width", call.name, call.kind, "0" * 64, {**call.payload, "params": params}, **facts)
    write_manifest(folder, old)
    for prompt in ("[/red] x", "[/INST]", "[bold]"):
        code, output = minitron("plan", TOY, root, f"stages.evaluate_teacher.prompts=['{prompt}']")
        assert code == 0, output
        assert prompt in output.replace("\n", ""), output


@pytest.mark.parametrize("command", ["check", "plan", "run", "report", "status", "chat", "logs"])
def test_a_path_in_brackets_is_named_in_the_message(command: str, minitron: Cli, tmp_path: Path) -> None:
    path = tmp_path / f"[/b]{CLIPBOARD}[red]"
    code, output = minitron(command, path / "x.yaml", *(["distill"] if command == "logs" else []))
    assert code == 2
    assert "[/b]\\x1b]52;c;" in output.replace("\n", "")
    assert _is_harmless(output)


@pytest.mark.parametrize("words", [["check", "--[/red]"], ["check", f"--{CLIPBOARD}"], [f"[/b]{CLIPBOARD}"]])
def test_usage_errors_are_not_markup(words: list[str], minitron: Cli) -> None:
    code, output = minitron(*words)
    assert code == 2
    assert _is_harmless(output)
    assert "[/red]" in output or "\\x1b]52" in output


def _run(root: Path) -> Path:
    run = root / "toy/width"
    (run / ".work/distill").mkdir(parents=True)
    (run / "logs").mkdir()
    return run


def test_logs_and_status_show_what_others_have_written(minitron: Cli, tmp_path: Path) -> None:
    run = _run(tmp_path)
    (run / "logs/distill.log").write_text(f"first\n{HOSTILE}\n\x1b[32mgreen\x1b[0m\n")
    facts = {"done": 1, "total": 2, "unit": f"steps{CLIPBOARD}", "eta_s": None, "fields": {"[/x]": CLIPBOARD}}
    (run / ".work/distill/progress.json").write_text(json.dumps(facts))
    for words in (["logs", TOY, "distill"], ["status", TOY], ["status", TOY, "--json"]):
        code, output = minitron(*words, f"execution.run_root={tmp_path}")
        assert code == 0, output
        assert _is_harmless(output)
    assert "[/INST]" in minitron("logs", TOY, "distill", f"execution.run_root={tmp_path}")[1]
    assert "\ngreen\n" in minitron("logs", TOY, "distill", f"execution.run_root={tmp_path}")[1]


DAMAGED = ["", "null", '{"done": 1, "jobs": 7}', "\udcff", "[" * 3000]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_of_a_running_stage_is_not_our_bug(text: str, minitron: Cli, tmp_path: Path) -> None:
    run = _run(tmp_path)
    content = text.encode(errors="surrogateescape")
    page = tmp_path / "status.html"
    (run / "launch/001").mkdir(parents=True)
    (run / ".work/distill/curves.jsonl").write_bytes(content)
    (run / ".work/distill/progress.json").write_bytes(content)
    assert minitron("status", TOY, f"execution.run_root={tmp_path}")[0] == 0
    facts = {"done": 1, "total": 2, "unit": "steps", "eta_s": 3, "fields": {}}
    (run / ".work/distill/progress.json").write_text(json.dumps(facts))
    assert minitron("status", TOY, f"execution.run_root={tmp_path}", "--html", page)[0] == 0
    (run / "launch/001/jobs.json").write_bytes(content)
    code, output = minitron("status", TOY, f"execution.run_root={tmp_path}")
    assert code == 2, output
    assert "jobs.json" in output
    assert "unexpected" not in output


def test_odd_values_in_a_progress_file_are_not_our_bug(minitron: Cli, tmp_path: Path) -> None:
    file = _run(tmp_path) / ".work/distill/progress.json"
    for eta in ('"x"', "1e999", "-1", "9" * 400):
        file.write_text(f'{{"done": [], "total": {{}}, "unit": 1, "eta_s": {eta}, "fields": {{"a": null}}}}')
        code, output = minitron("status", TOY, f"execution.run_root={tmp_path}")
        assert code == 0, (eta, output)


TEMPLATES = ["{% if %}", f"{{{{ messages[9].x.y or raise_exception('{CLIPBOARD}') }}}}"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_failing_template_is_reported_in_chat(template: str, minitron: Cli, tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path, "llama_gqa_tied")
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    (model / "chat_template.jinja").write_text(template)
    code, output = minitron("chat", model, "--once", "hi", "--max-new-tokens", 1)
    assert code == 2, output
    assert "unexpected" not in output
    assert _is_harmless(output)


@pytest.mark.parametrize("value", ["abc", "", "0", "-1", "1.5"])
def test_an_invalid_number_of_nodes_is_reported(value: str) -> None:
    with pytest.raises(EnvironmentProblem, match="MINITRON_NODES = "):
        Nodes.here({"MINITRON_NODES": value})


@pytest.mark.parametrize("name", ["logs", "launch"])
def test_a_stage_is_not_called_as_a_folder_of_the_run(name: str, minitron: Cli) -> None:
    code, output = minitron("check", TOY, f"+stages.{name}={{kind: import, source: asset:toy-llama}}")
    assert code == 2
    assert f"stages.{name}: the run itself uses a folder with this name" in output


def test_a_layout_for_a_stage_that_is_not_there_is_refused(minitron: Cli) -> None:
    code, output = minitron("check", TOY, "execution.parallel_by_stage={nosuch: {dp: 2}, distil: {dp: 2}}")
    assert code == 2
    assert "execution.parallel_by_stage.nosuch: this recipe has no such stage" in output
    assert "execution.parallel_by_stage.distil: this recipe has no such stage. Did you mean distill?" in output


PRINTERS = {"nemo_minitron/system/terminal.py", "nemo_minitron/system/progress.py"}
"""The module that writes to the terminal, and a line of progress, which is written through it."""


def test_all_output_goes_through_one_module() -> None:
    for file in sorted((REPO / "nemo_minitron").rglob("*.py")):
        name = str(file.relative_to(REPO))
        if "/entry/" in name:  # of the other environment: its output goes into a log
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and name != "nemo_minitron/system/terminal.py":
                assert node.module not in ("rich.console", "rich.markup"), f"{name}: use terminal.Screen"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert name in PRINTERS, f"{name}:{node.lineno}: use terminal.write"


def test_a_screen_takes_nothing_for_markup() -> None:
    screen = Screen()
    assert screen.render_str("[/red]:smile:").plain == "[/red]:smile:"
