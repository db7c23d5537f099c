"""Rules that a program can check ("use no comma"), as IFEval has them (2311.07911), by lm-eval's checkers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.files import RawRow, chat_files, read_rows
from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.errors import DataError, EnvironmentProblem

PUNKT = "punkt_tab"
"""nltk's model of sentences, which some rules need and no package ships."""


@dataclass(frozen=True)
class InstructionRow:
    """A prompt, and the rules that its answer has to follow."""

    prompt: str
    rules: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    """Of each rule: how many words, which keyword."""


def read_instructions(path: Path, max_rows: int) -> list[InstructionRow]:
    """The first rows of IFEval's form: {prompt, instruction_id_list, kwargs}.

    Raises:
        DataError: a row without these, or a rule that lm-eval does not have.
        EnvironmentProblem: lm-eval's checkers are not installed.
    """
    known = _checkers().instructions_registry.INSTRUCTION_DICT
    raws = (raw for file in chat_files(path) for raw in read_rows(file))
    return [_row(raw, known) for raw in islice(raws, max_rows)]


def _row(raw: RawRow, known: Mapping[str, Any]) -> InstructionRow:
    row = raw.content
    if isinstance(row, BadRow):
        raise DataError(f"The row cannot be used: {row}", where=raw.where)
    prompt, rules, settings = (row.get(key) for key in ("prompt", "instruction_id_list", "kwargs"))
    if not (isinstance(prompt, str) and isinstance(rules, list) and isinstance(settings, list) and rules):
        raise DataError(
            "The row has no prompt with rules.",
            where=raw.where,
            allowed='{"prompt": text, "instruction_id_list": [names], "kwargs": [an object for each]}',
        )
    if len(rules) != len(settings):
        raise DataError(f"The row has {len(rules)} rules and {len(settings)} kwargs.", where=raw.where)
    for rule in rules:
        if rule not in known:
            raise DataError(f"No such rule: {rule}", where=raw.where, allowed=", ".join(sorted(known)))
    # Tables hold every setting of every rule, most of them empty.
    kept = tuple({key: value for key, value in (each or {}).items() if value is not None} for each in settings)
    for rule, each in zip(rules, kept, strict=True):
        # lm-eval would draw what is missing at random.
        if missing := sorted(set(known[rule](rule).get_instruction_args_keys()) - set(each)):
            raise DataError(f"{rule} lacks {', '.join(missing)} in its kwargs.", where=raw.where)
    return InstructionRow(prompt, tuple(rules), kept)


def follows(row: InstructionRow, answer: str) -> dict[str, list[bool]]:
    """Whether the answer follows each rule: `strict`, and `loose` (without markup, first or last line).

    Raises:
        DataError: settings that do not belong to a rule.
        EnvironmentProblem: a rule needs nltk's model of sentences, which is not here.
    """
    checkers = _checkers()
    example = checkers.InputExample(0, list(row.rules), row.prompt, [dict(each) for each in row.settings])
    try:
        strict = checkers.test_instruction_following_strict(example, answer)
        loose = checkers.test_instruction_following_loose(example, answer)
    except LookupError as error:
        raise EnvironmentProblem(
            f"A rule of {', '.join(row.rules)} needs nltk's model of sentences.",
            next_step=f"python -m nltk.downloader {PUNKT}, or leave these rows out.",
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"Settings of {', '.join(row.rules)} do not fit: {error}", where=row.prompt[:60]) from error
    return {"strict": strict.follow_instruction_list, "loose": loose.follow_instruction_list}


def instruction_metrics(found: Sequence[Mapping[str, Sequence[bool]]]) -> dict[str, float]:
    """Shares of prompts with all rules followed, and of rules; `prompt_strict_se` over the prompts.

    Args:
        found: what `follows` gave, for each prompt.
    """
    out: dict[str, float] = {"prompts": len(found)}
    for kind in ("strict", "loose"):
        rules = [followed for row in found for followed in row[kind]]
        out[f"prompt_{kind}"] = sum(all(row[kind]) for row in found) / len(found)
        out[f"rule_{kind}"] = sum(rules) / len(rules)
    share = out["prompt_strict"]
    out["prompt_strict_se"] = math.sqrt(share * (1 - share) / len(found))
    return out


@cache
def _checkers() -> Any:
    try:
        with _no_download():
            import langdetect
            from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise EnvironmentProblem(
            f"The checkers of instructions cannot be imported: {error}",
            next_step="pip install 'nemo-minitron[eval]', or leave `instructions` out.",
        ) from error
    langdetect.DetectorFactory.seed = 0  # it guesses anew each time without
    return utils


@contextmanager
def _no_download() -> Iterator[None]:
    """lm-eval's module fetches nltk's model when it is imported; a stage reaches for no network on its own."""
    import nltk

    download = nltk.download
    nltk.download = lambda *args, **kwargs: False
    try:
        with redirect_stdout(StringIO()):  # it says that it has fetched it, whatever happened
            yield
    finally:
        nltk.download = download
