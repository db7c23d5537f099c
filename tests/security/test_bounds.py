"""Small files that would take hours or all memory are refused at once, with a message that tells how to continue."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from nemo_minitron.config.compose import compose
from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.data.found import find_files
from nemo_minitron.data.readers import read_documents
from nemo_minitron.errors import ConfigError, DataError, MinitronError, shortened
from nemo_minitron.hf.license import read_license
from nemo_minitron.limits import Limit
from nemo_minitron.schema.data import DataSource
from tests.conftest import TOY, Cli
from tests.support.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("soon")


# --- YAML -----------------------------------------------------------------------------------------

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
REFERENCES = "a0: xxxxxxxxxx\n" + "".join(f"a{i}: '{f'${{a{i - 1}}}' * 9}'\n" for i in range(1, 12))
SECTIONS = "a0: {x: 1, y: 2}\n" + "".join(
    f"a{i}:\n" + "".join(f"  k{j}: ${{a{i - 1}}}\n" for j in range(9)) for i in range(1, 12)
)
LONG_REFERENCES = f"a0: {'x' * 100_000}\n" + "".join(f"a{i}: '{f'${{a{i - 1}}}' * 50}'\n" for i in range(1, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "MINITRON_MAX_YAML_NODES"),
        (MERGES, "MINITRON_MAX_YAML_NODES"),
        (REFERENCES, "MINITRON_MAX_YAML_NODES"),
        (SECTIONS, "MINITRON_MAX_YAML_NODES"),
        (LONG_REFERENCES, "MINITRON_MAX_YAML_NODES"),
        ("a: " + "[" * 50_000, "nested deeper than 100 levels"),
        ("a: " + "{a: " * 5_000, "nested deeper than 100 levels"),
        ("".join(f"{' ' * i}a:\n" for i in range(500)), "nested deeper than 100 levels"),
        ("a: 'x'\n" * 60_000, "MINITRON_MAX_YAML_BYTES"),
        ("a: ${a}", "Recursive interpolation"),
        ("a: ${b}\nb: ${a}", "Recursive interpolation"),
        (f"a: {'9' * 5_000}", "integer"),
    ],
    ids=lambda value: value[:12],
)
def test_a_recipe_that_expands_without_bound_is_refused(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "${" in text:  # the same in a twentieth of the time
        monkeypatch.setenv("MINITRON_MAX_YAML_NODES", "5000")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(file)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("text", [ALIASES, REFERENCES], ids=["aliases", "references"])
def test_a_config_beside_a_recipe_is_bounded_too(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_MAX_YAML_NODES", "5000")
    (tmp_path / "bomb.yaml").write_text(f"# @package x\n{text}".replace("${a", "${x.a"))
    (tmp_path / "mine.yaml").write_text("defaults: [bomb, _self_]\n")
    with pytest.raises(ConfigError, match="MINITRON_MAX_YAML_NODES"):
        compose(tmp_path / "mine.yaml")


def test_an_override_is_bounded_too() -> None:
    with pytest.raises(ConfigError):
        compose(TOY, ["stages.data.sources=" + "[" * 3000])


def test_a_recipe_of_a_real_size_is_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = "".join(f"  s{i}: &s{i} {{kind: prune, note: 'text {i}'}}\n" for i in range(300))
    (tmp_path / "mine.yaml").write_text(f"stages:\n{many}more: [{', '.join(f'*s{i}' for i in range(300))}]\n")
    assert len(compose(tmp_path / "mine.yaml")["more"]) == 300
    (tmp_path / "mine.yaml").write_text("a: 'x'\n" * 1000)
    monkeypatch.setenv("MINITRON_MAX_YAML_BYTES", "6999")
    with pytest.raises(ConfigError, match="MINITRON_MAX_YAML_BYTES"):
        compose(tmp_path / "mine.yaml")
    monkeypatch.setenv("MINITRON_MAX_YAML_BYTES", "7000")
    with pytest.raises(ConfigError, match="duplicate key"):
        compose(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "text", [ALIASES, "a: " + "[" * 50_000, "license: " + "9" * 5_000], ids=["alias", "deep", "int"]
)
def test_the_header_of_a_model_card_is_bounded(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n# Card")
    assert read_license(tmp_path) is None


# --- files that are searched ----------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*/*.txt", "", "{0,1,2,3,4,5,6,7,8,9}" * 4])
def test_a_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    for i in range(6):
        (tmp_path / f"{i}/{i}").mkdir(parents=True)
        for j in range(6):
            (tmp_path / f"{i}/{i}/{j}.txt").write_text("x")
    found = find_files(tmp_path / pattern) if "{" not in pattern else None
    assert found is None or len(found.files) == 36
    monkeypatch.setenv("MINITRON_MAX_FILES_LOOKED_AT", "30")
    with pytest.raises(DataError, match="stopped after 30 files and folders") as caught:
        find_files(tmp_path / pattern)
    assert "MINITRON_MAX_FILES_LOOKED_AT" in str(caught.value)


def test_check_reports_a_search_over_too_many_files(
    tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_MAX_FILES_LOOKED_AT", "500")
    code, output = minitron(
        "check", TOY, "stages.data.sources=[{source: '/usr/**/*.nosuch'}]", f"execution.run_root={tmp_path}"
    )
    assert code == 2
    assert "stopped after 500" in output


# --- texts ----------------------------------------------------------------------------------------


def _read(file: Path, **options: Any) -> list[str]:
    return [found.text for found in read_documents(file, DataSource(source=str(file), **options))]


def test_a_compressed_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "x.txt.zst"
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    block = b"x" * (1 << 20)
    with file.open("wb") as stream:
        for _ in range(400):
            stream.write(packer.compress(block))
        stream.write(packer.flush())
    assert file.stat().st_size < 262_144
    with pytest.raises(DataError, match="decompress to more than 1,000 times as many"):
        _read(file)


def test_a_large_decompression_window_needs_a_higher_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=False)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "x.txt.zst").write_bytes(frame.compress(b"text") + frame.flush())
    with pytest.raises(DataError, match="MINITRON_MAX_WINDOW_BYTES"):
        _read(tmp_path / "x.txt.zst")
    monkeypatch.setenv("MINITRON_MAX_WINDOW_BYTES", str(1 << 28))
    assert _read(tmp_path / "x.txt.zst") == ["text"]


def test_long_lines_and_documents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "x" * 3_000_000}) + "\n" + '{"text": "y"}\n')
    (tmp_path / "x.txt").write_text("x" * 3_000_000)
    (tmp_path / "x.json").write_text(json.dumps([{"text": "x" * 3_000_000}]))
    assert len(_read(tmp_path / "x.jsonl")) == 2
    monkeypatch.setenv("MINITRON_MAX_LINE_BYTES", "1000000")
    monkeypatch.setenv("MINITRON_MAX_DOCUMENT_BYTES", "1000000")
    for name in ("x.jsonl", "x.txt", "x.json"):
        with pytest.raises(DataError, match=r"MINITRON_MAX_(LINE|DOCUMENT)_BYTES"):
            _read(tmp_path / name)


def test_a_number_of_five_thousand_digits_names_its_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "y"}\n{"text": ' + "9" * 5_000 + "}\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2"):
        _read(tmp_path / "x.jsonl")


# --- templates ------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hi"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='x') %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        (LOOPS, "takes more than 1 s for one dialogue"),
        (DOUBLING, "takes more than 300,000,000 bytes"),
        ("{{ 'x'.center(900000000) }}", "takes more than 300,000,000 bytes"),
        ("{{ '%0999999999d' % 1 }}", "takes more than 300,000,000 bytes"),
        ("{{ 'x' * messages[0].content | length * 9 ** 99 }}", "products or powers"),
        ("{{ 99999999 ** 99999999 }}", "products or powers"),
        ("{{ 'xx' * 1000000000000 }}", "products or powers"),
        ("{{ ('f' * 10) | int(base=16) }}", "products or powers"),
        ("{{ 'x'.center(40000000) }}", "writes 40,000,000 characters"),
    ],
)
def test_a_template_cannot_run_without_end(monkeypatch: pytest.MonkeyPatch, jinja: str, message: str) -> None:
    monkeypatch.setenv("MINITRON_MAX_TEMPLATE_SECONDS", "1")
    monkeypatch.setenv("MINITRON_MAX_TEMPLATE_BYTES", "300000000")
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", jinja)
    with pytest.raises(DataError, match=message):
        ChatTemplate.bind(tokenizer, "model", where="here").prompt(MESSAGES)


def test_a_template_that_fails_is_a_reason_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    for jinja in ("{{ 1 / 0 }}", "{{ raise_exception('x' * 900) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"):
        monkeypatch.setattr(tokenizer, "chat_template", jinja)
        with pytest.raises(BadRow) as caught:
            ChatTemplate.bind(tokenizer, "model", where="here").prompt(MESSAGES)
        assert len(str(caught.value)) < 500


def test_limits_of_a_template_cost_microseconds() -> None:
    template = ChatTemplate.bind(tiny_tokenizer(), "model", where="here")
    template.prompt(MESSAGES)
    begun = time.process_time()
    for _ in range(300):
        template.prompt(MESSAGES)
    assert (time.process_time() - begun) / 300 < 0.002


# --- messages -------------------------------------------------------------------------------------


def test_messages_stay_short() -> None:
    assert shortened("short") == "short"
    assert len(shortened("x" * 10**6)) < 400
    error = MinitronError("x" * 10**7, where="y" * 10**7, allowed="z\n" * 10**5, next_step="w")
    assert len(str(error)) < 50_000
    path = "/" + "d" * 4000
    assert path in str(MinitronError("what", where=path))


def test_a_limit_that_is_no_number_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit("MINITRON_MAX_NOTHING", 5)
    assert limit.value() == 5
    for text in ("many", "-1", "0", "1e9", "9" * 30):
        monkeypatch.setenv("MINITRON_MAX_NOTHING", text)
        with pytest.raises(MinitronError, match="MINITRON_MAX_NOTHING"):
            limit.value()
    monkeypatch.setenv("MINITRON_MAX_NOTHING", "7")
    assert limit.value() == 7


def test_impossible_file_names_are_reported(tmp_path: Path, minitron: Cli) -> None:
    long = "x" * 5000
    for words in (
        ("check", long),
        ("check", TOY, f"stages.teacher.source={long}"),
        ("check", TOY, f"stages.data.sources=[{{source: {long}}}]"),
        ("plan", TOY, f"execution.run_root={tmp_path}/{long}"),
        ("chat", long),
    ):
        code, output = minitron(*words)
        assert code == 2, output
        assert "unexpected" not in output


@pytest.mark.parametrize(
    "override",
    [
        "stages.distill.lr=.inf",
        "stages.distill.lr=.nan",
        "stages.data.sources=[{source: asset:toy-text, weight: .inf}]",
        "execution.parallel.pp=1000000000",
        "execution.parallel.tp=1000000000",
        "stages.teacher.architecture={architectures: [[x]]}",
        "stages.teacher.architecture={num_hidden_layers: 300000000}",
    ],
)
def test_odd_numbers_in_a_recipe_are_reported(tmp_path: Path, minitron: Cli, override: str) -> None:
    code, output = minitron("check", TOY, override, f"execution.run_root={tmp_path}")
    assert code == 2, output
    assert "unexpected" not in output


def test_numbers_that_python_cannot_print_are_reported(tmp_path: Path, minitron: Cli) -> None:
    """YAML reads hexadecimal numbers of any length, and Python refuses to print numbers of more than 4,300 digits."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"defaults: [toy/width, _self_]\nstages: {{distill: {{num_steps: 0x{'f' * 6000}}}}}\n")
    code, output = minitron("check", recipe)
    assert code == 2, output
    assert "stages.distill.num_steps" in output
    assert "unexpected" not in output


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- 2>&-"])
def test_chat_without_open_streams_ends_with_a_message(tmp_path: Path, closed: str) -> None:
    words = f"{sys.executable} -m nemo_minitron chat {tmp_path} {closed}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "unexpected" not in done.stdout + done.stderr


def test_a_deleted_working_folder_is_reported(tmp_path: Path) -> None:
    words = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && {sys.executable} -m nemo_minitron"
    for command in (f"check {TOY}", "chat x", "status toy/width"):
        done = subprocess.run(
            ["bash", "-c", f"{words} {command}"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "has been deleted" in done.stderr
