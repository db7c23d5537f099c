"""Instructions that a program can verify ("use no comma"), from IFEval (2311.07911), checked by lm-eval's code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.bad_rows import BadRows
from nemo_minitron.data.chat.files import RawRow, chat_files, read_rows
from nemo_minitron.data.chat.rows import BadRow, checked_text
from nemo_minitron.errors import DataError, EnvironmentProblem
from nemo_minitron.system.shown import shown

PUNKT = "punkt_tab"
"""nltk's sentence tokenizer model, which some rules need and no package ships."""
_PROBE = "A word, and another one."
"""Arbitrary answer that reveals invalid settings of a rule before a model generates answers."""


@dataclass(frozen=True)
class InstructionRow:
    """A prompt with the rules that its answer must follow."""

    prompt: str
    rules: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    """Arguments of each rule, such as a number of words or a keyword."""
    where: str = ""
    """File and line of the row."""


def read_instructions(path: Path, max_rows: int, bad: BadRows | None = None) -> list[InstructionRow]:
    """Read the first rows in IFEval's form, {prompt, instruction_id_list, kwargs}, and try each on an answer.

    Args:
        bad: counter of unusable rows, which are skipped; None: raise an error for the first one.

    Raises:
        DataError: a row lacks a key, lm-eval does not have its rule, or the settings do not fit the rule.
        EnvironmentProblem: lm-eval's checkers, or packages that a rule needs, are not installed.
    """
    known = _checkers().instructions_registry.INSTRUCTION_DICT
    out, counted = [], bad or BadRows()
    for raw in islice((raw for file in chat_files(path) for raw in read_rows(file)), max_rows):
        counted.num_rows += 1
        try:
            out.append(_row(raw, known))
        except BadRow as reason:
            if bad is None:
                raise DataError(f"The row cannot be used: {reason}", where=raw.where) from reason
            bad.add(raw.where, reason)
    return out


def _row(raw: RawRow, known: Mapping[str, Any]) -> InstructionRow:
    row = raw.content
    if isinstance(row, BadRow):
        raise row
    prompt, rules, settings = (row.get(key) for key in ("prompt", "instruction_id_list", "kwargs"))
    if not (isinstance(prompt, str) and isinstance(rules, list) and isinstance(settings, list) and rules):
        raise BadRow(
            "the row has no prompt with rules: "
            '{"prompt": text, "instruction_id_list": [names], "kwargs": [an object for each]}'
        )
    checked_text(prompt, "prompt")
    if len(rules) != len(settings):
        raise BadRow(f"the row has {len(rules)} rules and {len(settings)} kwargs")
    kept = tuple(_settings(rule, each, known) for rule, each in zip(rules, settings, strict=True))
    found = InstructionRow(prompt, tuple(rules), kept, raw.where)
    try:
        follows(found, _PROBE)
    except DataError as error:
        raise BadRow(error.what) from error
    return found


def with_rules(prompt: str, row: Mapping[str, Any]) -> InstructionRow:
    """Return a prompt with the rules of its row of a chat_data stage.

    Raises:
        DataError: the row has none.
    """
    names, settings = row.get("instruction_id_list"), row.get("kwargs")
    if not names or settings is None:
        raise DataError(
            'The row of a prompt has no "instruction_id_list" and "kwargs".',
            where=f"prompt {prompt[-60:]!r}",
            next_step="Use rule: instructions with rows in IFEval's form only.",
        )
    return InstructionRow(prompt, tuple(names), tuple(settings))


def require_checkable(row: InstructionRow) -> None:
    """Try the rules of a prompt on an answer.

    Raises:
        DataError: lm-eval does not have one of the rules, or its settings do not fit.
        EnvironmentProblem: lm-eval's checkers, or packages that a rule needs, are not installed.
    """
    known = _checkers().instructions_registry.INSTRUCTION_DICT
    try:
        for name, settings in zip(row.rules, row.settings, strict=True):
            _settings(name, settings, known)
    except BadRow as reason:
        raise DataError(f"The row cannot be used: {reason}", where=f"prompt {row.prompt[-60:]!r}") from reason
    follows(row, _PROBE)


def _settings(rule: Any, settings: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a rule that are not null.

    Raises:
        BadRow: lm-eval does not have the rule, or required settings are missing.
    """
    if not isinstance(rule, str) or rule not in known:
        raise BadRow(f"unknown rule: {shown(rule)}; known: {', '.join(sorted(known))}")
    if settings is not None and not isinstance(settings, dict):
        raise BadRow(f"kwargs contains {shown(settings)}, not an object")
    # Tables have a column for every setting of every rule, most of them empty.
    kept = {key: value for key, value in (settings or {}).items() if value is not None}
    # lm-eval would choose missing settings at random.
    if missing := sorted(set(known[rule](rule).get_instruction_args_keys() or ()) - set(kept)):
        raise BadRow(f"{rule} lacks {', '.join(missing)} in its kwargs")
    return kept


def follows(row: InstructionRow, answer: str) -> dict[str, list[bool]]:
    """Return whether the answer follows each rule: `strict`, and `loose` (without markup, first or last line).

    Raises:
        DataError: settings that do not fit a rule.
        EnvironmentProblem: a rule needs nltk's sentence tokenizer model, which is not installed.
    """
    checkers = _checkers()
    example = checkers.InputExample(0, list(row.rules), row.prompt, [dict(each) for each in row.settings])
    try:
        strict = checkers.test_instruction_following_strict(example, answer)
        loose = checkers.test_instruction_following_loose(example, answer)
    except LookupError as error:
        raise EnvironmentProblem(
            f"A rule of {', '.join(row.rules)} needs nltk's sentence tokenizer model.",
            next_step=f"Run python -m nltk.downloader {PUNKT}, or remove these rows.",
        ) from error
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError, re.error) as error:
        raise DataError(f"Settings of {', '.join(row.rules)} do not fit: {error}", where=row.prompt[:60]) from error
    return {"strict": strict.follow_instruction_list, "loose": loose.follow_instruction_list}


def instruction_metrics(found: Sequence[Mapping[str, Sequence[bool]]]) -> dict[str, float]:
    """Return the share of prompts whose rules are all followed, and the share of followed rules.

    `prompt_strict_se` is the standard error over the prompts.

    Args:
        found: results of `follows` for each prompt; at least one.
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
            next_step="pip install 'nemo-minitron[eval]', or remove `instructions`.",
        ) from error
    langdetect.DetectorFactory.seed = 0  # without a seed, its guesses vary
    return utils


@contextmanager
def _no_download() -> Iterator[None]:
    """Prevent lm-eval's module from downloading nltk's model at import: stages do not use the network on their own."""
    import nltk

    download = nltk.download
    nltk.download = lambda *args, **kwargs: False
    try:
        with redirect_stdout(StringIO()):  # it prints that it has downloaded the model in any case
            yield
    finally:
        nltk.download = download
