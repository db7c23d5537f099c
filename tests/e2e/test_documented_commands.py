"""Every `minitron` command of README and docs is valid, and those that can run here are run.

Commands are parsed by the command line's own parser, so that a renamed option fails here. Recipes and overrides are
planned. Nothing needs a network, a GPU, Slurm or containers.
"""

from __future__ import annotations

import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from nemo_minitron.api import load_plan
from nemo_minitron.cli.main import make_app
from nemo_minitron.plan.checks import find_problems
from tests.conftest import REPO, Cli
from tests.golden.test_recipes import MISSING

PAGES = (REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")), *sorted((REPO / "recipes").glob("*.md")))
SHELL_BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
RECIPE_BLOCK = re.compile(r"^```yaml\n(defaults:.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`minitron ([^`]+)`")
HELP = str(make_app(()).info.help)
PLACEHOLDERS = ("RECIPE", "RECIPE_OR_RUN")
OVERRIDABLE = ("run", "plan", "check", "launch")
NOT_AN_OVERRIDE = re.compile(r"--|\.\.\.$|[A-Z_]+$")
Words = tuple[str, ...]


def _split(line: str) -> list[list[str]]:
    """Return the simple commands of a line, without comments, prompts and redirections."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word in (">", ">>", "<"):
            next(words, None)
        elif word and set(word) <= set("();|&"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def _in_blocks(page: Path) -> set[Words]:
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(SHELL_BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    commands = [command for line in lines for command in _split(line)]
    return {tuple(words[1:]) for words in commands if words and Path(words[0]).name == "minitron"}


def _inline(text: str) -> set[Words]:
    found = INLINE.findall(ANY_BLOCK.sub("", text))
    return {tuple(words) for line in found for words in _split(line)[:1] if words}


COMMANDS = sorted(set().union(*map(_in_blocks, PAGES), _inline(HELP)))
MENTIONS = sorted(set().union(*(_inline(page.read_text(encoding="utf-8")) for page in PAGES)))


@cache
def _cli() -> Any:
    return typer.main.get_command(make_app())


def _command(words: Words) -> tuple[click.Command, Words, tuple[str, ...]]:
    """Return the command that the words name, its arguments, and its name of one or two words."""
    command: Any = _cli()
    names: tuple[str, ...] = ()
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"minitron has no command {' '.join((*names, words[0]))}"
        command, names, words = command.commands[words[0]], (*names, words[0]), words[1:]
    return command, words, names


def _parsed(words: Words) -> tuple[tuple[str, ...], dict[str, Any]]:
    command, arguments, names = _command(words)
    with command.make_context(names[-1], list(arguments)) as context:
        return names, context.params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which a reader types the commands, with the two files that the tutorial makes."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "configs"):
        shutil.copytree(REPO / name, folder / name)
    shutil.copy(REPO / "recipes" / "template.yaml", folder / "mine.yaml")
    shutil.copy(REPO / "configs" / "cluster" / "slurm.yaml", folder / "mysite.yaml")
    return folder


def _planned() -> list[Words]:
    """Return the recipe and overrides of every command that names a recipe, those of the help included, each once."""
    found = set()
    for words in COMMANDS:
        _, params = _parsed(words)
        recipe = str(params.get("recipe") or "")
        if recipe and recipe not in PLACEHOLDERS and Path(recipe).parts[0] != "runs":
            found.add((recipe, *(params.get("overrides") or ())))
    return sorted(found)


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) >= 30
    assert len(MENTIONS) >= 20
    assert len(RECIPE_BLOCKS) >= 2


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_a_block_is_parsed(words: Words) -> None:
    _parsed(words)


@pytest.mark.parametrize("words", MENTIONS, ids=" ".join)
def test_a_command_in_a_sentence_and_its_options_exist(words: Words) -> None:
    command, arguments, _ = _command(words)
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in options]
    assert not unknown


@pytest.mark.parametrize("words", _planned(), ids=" ".join)
def test_recipe_and_overrides_of_a_command_can_be_planned(
    words: Words, folder: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    code, text = minitron("plan", *words)
    assert code == 0, text
    # `plan` shows the problems for which `run` and `launch` would refuse the recipe, and exits with 0.
    _require_only_missing_files(words[0], words[1:])


def _require_only_missing_files(recipe: str, overrides: Words = ()) -> None:
    problems = list(find_problems(load_plan(recipe, overrides, checked=False)))
    assert all(any(words in problem for words in MISSING) for problem in problems), problems


RECIPE_BLOCKS = [(page, block) for page in PAGES for block in RECIPE_BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "block"), RECIPE_BLOCKS, ids=[page.name for page, _ in RECIPE_BLOCKS])
def test_a_recipe_of_a_page_can_be_pasted_into_a_file(
    page: Path, block: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    Path("pasted.yaml").write_text(block, encoding="utf-8")
    _require_only_missing_files("pasted.yaml")


def _runs_here(words: Words) -> bool:
    names, params = _parsed(words)
    recipe = str(params.get("recipe") or "")
    if recipe in PLACEHOLDERS:
        return False
    if names == ("check",):
        return "toy" in recipe and not params["cluster"]
    if names in (("launch",), ("status",)):
        return bool(params.get("dry_run")) if names == ("launch",) else "toy" in recipe and not params["watch"]
    return names in (("recipes",), ("schema",), ("version",), ("assets", "list"))


@pytest.mark.parametrize("words", [words for words in COMMANDS if _runs_here(words)], ids=" ".join)
def test_a_command_that_can_run_here_runs(
    words: Words, folder: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    code, text = minitron(*words)
    assert code == 0, text
    assert text.strip()


def test_words_after_the_recipe_in_a_sentence_are_overrides() -> None:
    wrong = []
    for words in MENTIONS:
        _, arguments, names = _command(words)
        if names[0] in OVERRIDABLE:
            operands = [word for word in arguments if not NOT_AN_OVERRIDE.match(word)]
            wrong += [word for word in operands if "=" not in word and "/" not in word and word != "template"]
    assert not wrong
