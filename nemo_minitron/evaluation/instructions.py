"""Rules that a program can check ("use no comma"), as IFEval has them (2311.07911), by lm-eval's checkers."""

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
"""nltk's model of sentences, which some rules need and no package ships."""
_PROBE = "A word, and another one."
"""Any answer: settings that do not fit a rule are found with it before a model has answered anything."""


@dataclass(frozen=True)
class InstructionRow:
    """A prompt, and the rules that its answer has to follow."""

    prompt: str
    rules: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    """Of each rule: how many words, which keyword."""
    where: str = ""
    """File and line."""


def read_instructions(path: Path, max_rows: int, bad: BadRows | None = None) -> list[InstructionRow]:
    """The first rows of IFEval's form: {prompt, instruction_id_list, kwargs}. Each is tried once on an answer.

    Args:
        bad: counts the rows that cannot be used, which are left out; None: the first one is an error.

    Raises:
        DataError: a row without these, a rule that lm-eval does not have, or settings that do not fit it.
        EnvironmentProblem: lm-eval's checkers, or what a rule needs, are not installed.
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


def _settings(rule: Any, settings: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a rule that are given."""
    if not isinstance(rule, str) or rule not in known:
        raise BadRow(f"no such rule: {shown(rule)}; known: {', '.join(sorted(known))}")
    if settings is not None and not isinstance(settings, dict):
        raise BadRow(f"kwargs holds {shown(settings)}, not an object")
    # Tables hold every setting of every rule, most of them empty.
    kept = {key: value for key, value in (settings or {}).items() if value is not None}
    # lm-eval would draw what is missing at random.
    if missing := sorted(set(known[rule](rule).get_instruction_args_keys() or ()) - set(kept)):
        raise BadRow(f"{rule} lacks {', '.join(missing)} in its kwargs")
    return kept


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
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError, re.error) as error:
        raise DataError(f"Settings of {', '.join(row.rules)} do not fit: {error}", where=row.prompt[:60]) from error
    return {"strict": strict.follow_instruction_list, "loose": loose.follow_instruction_list}


def instruction_metrics(found: Sequence[Mapping[str, Sequence[bool]]]) -> dict[str, float]:
    """Shares of prompts with all rules followed, and of rules; `prompt_strict_se` over the prompts.

    Args:
        found: what `follows` gave, for each prompt; at least one.
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
