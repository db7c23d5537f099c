"""Rewards of answers that a program computes: the functions, and their weighted sum."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.evaluation.final_number import is_exact_match
from nemo_minitron.evaluation.instructions import follows, with_rules
from nemo_minitron.schema.rewards import RewardRule


@dataclass(frozen=True)
class Answer:
    """An answer of a model, without the text that ends it."""

    prompt: str
    text: str
    num_tokens: int
    """Tokens of the answer, with those that end it."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row of the prompt: "reference" is its own answer; rules of IFEval are in "instruction_id_list" and "kwargs".
    """


Rule = Callable[[Answer], float]


def make_rules(rules: Sequence[RewardRule]) -> list[Rule]:
    """Return the functions of the rules, without their weights.

    Raises:
        ConfigError: a function cannot be imported.
    """
    return [_MAKERS[rule.rule](rule) for rule in rules]


def rewards(rules: Sequence[RewardRule], functions: Sequence[Rule], answers: Sequence[Answer]) -> list[float]:
    """Return the weighted sum of the rules for each answer.

    Raises:
        DataError: a rule returned no finite number, or a row lacks what a rule needs.
    """
    return [
        sum(rule.weight * _value(rule, function, answer) for rule, function in zip(rules, functions, strict=True))
        for answer in answers
    ]


def _value(rule: RewardRule, function: Rule, answer: Answer) -> float:
    value = float(function(answer))
    if not math.isfinite(value):
        raise DataError(f"The reward by rule {rule.rule} is {value}.", where=f"answer to {answer.prompt[-60:]!r}")
    return value


def _length(rule: RewardRule) -> Rule:
    target = rule.target
    assert target is not None

    def reward(answer: Answer) -> float:
        counts = {"characters": len(answer.text), "words": len(answer.text.split()), "tokens": answer.num_tokens}
        return max(0.0, 1.0 - abs(counts[rule.unit] - target) / target)

    return reward


def _contains(rule: RewardRule) -> Rule:
    word = re.compile(rf"(?<!\w){re.escape(rule.text or '')}(?!\w)", re.IGNORECASE)
    return lambda answer: float(word.search(answer.text) is not None)


def _matches(rule: RewardRule) -> Rule:
    pattern = re.compile(rule.pattern or "")
    return lambda answer: float(pattern.search(answer.text) is not None)


def _final_number(rule: RewardRule) -> Rule:
    return lambda answer: float(is_exact_match(answer.text, str(answer.row.get("reference", ""))))


def _instructions(rule: RewardRule) -> Rule:
    def reward(answer: Answer) -> float:
        found = follows(with_rules(answer.prompt, answer.row), answer.text)["strict"]
        return sum(found) / len(found)

    return reward


def _function(rule: RewardRule) -> Rule:
    module, _, name = (rule.function or "").partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The reward function {rule.function} cannot be imported: {error}",
            next_step="Install its package beside nemo-minitron, or put its folder on PYTHONPATH.",
        ) from error
    return lambda answer: function(answer.prompt, answer.text, answer.row)


def _random(rule: RewardRule) -> Rule:
    generator = random.Random(0)
    return lambda answer: generator.random()


_MAKERS: dict[str, Callable[[RewardRule], Rule]] = {
    "final_number": _final_number,
    "length": _length,
    "contains": _contains,
    "matches": _matches,
    "instructions": _instructions,
    "function": _function,
    "random": _random,
}
