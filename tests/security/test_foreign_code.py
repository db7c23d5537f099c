"""Python files that models and recipes of other people name are never run, and there is no prompt to run them."""

from __future__ import annotations

import ast
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import ConfigError, MinitronError, PlanError
from nemo_minitron.evaluation.tasks import require_known
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.plan.task_names import is_known
from tests.conftest import REPO, TOY, Cli
from tests.support.tiny_models import tiny_tokenizer

TOY_MODEL = REPO / "nemo_minitron" / "toy" / "model"


def _model_with_code(folder: Path) -> tuple[Path, Path]:
    """Return (a model whose files name code in its folder, the file that the code would create)."""
    model, marker = folder / "model", folder / "was-run"
    shutil.copytree(TOY_MODEL, model)
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("tokenization_evil", "configuration_evil", "modeling_evil"):
        (model / f"{name}.py").write_text(f"{code}class Evil:\n    pass\n")
    maps = {
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
        "AutoConfig": "configuration_evil.Evil",
    }
    for name, more in (
        ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": maps}),
        ("config.json", {"auto_map": {**maps, "AutoModelForCausalLM": "modeling_evil.Evil"}}),
        ("generation_config.json", {"custom_generate": "modeling_evil.py", "auto_map": maps}),
    ):
        file = model / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    return model, marker


def test_a_tokenizer_never_runs_its_code(tmp_path: Path) -> None:
    model, marker = _model_with_code(tmp_path)
    load_tokenizer(model)
    assert not marker.exists()


def test_chat_on_a_terminal_neither_runs_code_nor_asks(tmp_path: Path) -> None:
    model, marker = _model_with_code(tmp_path)
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "nemo_minitron", "chat", str(model), "--once", "Hi", "--max-new-tokens", "2"]
    done = subprocess.run(
        words, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, text=True, check=False
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, done.stdout
    assert not marker.exists()
    assert "custom code" not in done.stdout
    assert "trust" not in done.stdout


def test_every_loader_of_the_package_refuses_remote_code() -> None:
    """These are all objects that transformers loads by a class that the folder may choose."""
    for file in sorted((REPO / "nemo_minitron").rglob("*.py")):
        if "backends/alignment/nemo_aligner/entry" in str(file):
            continue
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or call.func.attr != "from_pretrained":
                continue
            options = {keyword.arg: keyword.value for keyword in call.keywords}
            chosen = ast.unparse(call.func.value)
            if chosen in _OWN_CLASSES:
                continue
            assert "trust_remote_code" in options, f"{file}:{call.lineno}"
            assert ast.unparse(options["trust_remote_code"]) == "False", f"{file}:{call.lineno}"


_OWN_CLASSES = ("PreTrainedTokenizerFast", "GenerationConfig")
"""These classes run no code of a folder."""


@pytest.mark.parametrize(
    "override",
    [
        "stages.score.depth_task={name: 'FOLDER/evil.yaml'}",
        "stages.score.depth_task={name: evil.yaml}",
        "stages.score.depth_task={name: ../evil}",
        "stages.evaluate_teacher.tasks=['FOLDER/evil.yaml']",
        "stages.evaluate_teacher.tasks=[evil.yaml]",
        "stages.evaluate_teacher.tasks=['.']",
    ],
)
def test_files_of_tasks_are_refused(tmp_path: Path, minitron: Cli, override: str) -> None:
    marker = tmp_path / "was-run"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef run(doc): return ''\n")
    (tmp_path / "evil.yaml").write_text("task: evil\ndoc_to_text: !function evil.run\ndataset_path: json\n")
    word = override.replace("FOLDER", str(tmp_path))
    code, output = minitron("run", TOY, word, f"execution.run_root={tmp_path / 'runs'}")
    assert code == 2, output
    assert "is not the name of a task of lm-eval" in output
    assert not marker.exists()


def test_lm_eval_gets_only_its_own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before lm-eval, which would accept the name of any file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arc_evil").write_text("task: x\n")
    for name in ("arc_evil", str(tmp_path / "arc_evil")):
        with pytest.raises(PlanError, match="lm-eval has no task"):
            require_known([name], ["arc_easy"])


def test_check_verifies_the_names_of_tasks(tmp_path: Path, minitron: Cli) -> None:
    pytest.importorskip("lm_eval")
    assert is_known("arc_easy")
    assert is_known("mmlu_abstract_algebra")
    words = ["stages.score.layer_metrics=[task]", f"execution.run_root={tmp_path}"]
    code, output = minitron("check", TOY, "stages.score.depth_task={name: winogrande_}", *words)
    assert code == 2
    assert "stages.score.depth_task.name = 'winogrande_': lm-eval has no such task." in output


def test_the_message_names_the_key() -> None:
    from nemo_minitron.api import load_recipe

    with pytest.raises(ConfigError, match=r"stages\.score\.depth_task\.name"):
        load_recipe(TOY, ["stages.score.depth_task={name: /tmp/evil.yaml}"])


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",  # CVE-2025-27516, before jinja2 3.1.6
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",  # CVE-2024-56326, before 3.1.5
        "{{ ('{x.__class__.__mro__}' | attr('format_map'))({'x': messages}) }}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_a_chat_template_does_not_get_out_of_its_sandbox(jinja: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", jinja + "x")
    with pytest.raises((BadRow, MinitronError), match=r"unsafe|undefined|callable"):
        print(ChatTemplate.bind(tokenizer, "model", where="here").prompt([{"role": "user", "content": "Hi"}]))
