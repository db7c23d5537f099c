"""Checks that a chat template depends only on the messages, the options of the call and a fixed date."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from nemo_minitron.errors import ConfigError, DataError, shortened

_RANDOM = {"random": "the filter random", "lipsum": "the function lipsum"}

_MAX_FACTOR = 1000


class _Generation(Extension):
    """Parses the block {% generation %} of transformers, which marks an answer."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def require_pure(jinja: str, where: str) -> None:
    """Raise DataError for a template that is invalid Jinja, gives random output or could run without end."""
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(jinja)
    except (TemplateError, RecursionError) as error:
        raise DataError(f"The chat template is not valid Jinja: {shortened(error)}", where=where or None) from error
    _require_short_sums(tree, where)
    filters = {str(found.name) for found in tree.find_all(nodes.Filter)}
    names = {str(found.name) for found in tree.find_all(nodes.Name)}
    for name, what in _RANDOM.items():
        if name in filters | names:
            raise DataError(
                f"The chat template uses {what}, so its output changes each time.",
                where=where or None,
                next_step="Choose another template; training rows have to be identical on every start.",
            )


def _require_short_sums(tree: nodes.Template, where: str) -> None:
    """Refuse arithmetic with huge numbers: a single operation could take hours and cannot be interrupted."""
    unbounded: list[nodes.Expr] = [node for node in tree.find_all((nodes.Pow, nodes.Mul)) if not _is_small(node)]
    unbounded += [node for node in tree.find_all(nodes.Filter) if node.name == "int" and _has_base(node)]
    if unbounded:
        raise DataError(
            "The chat template has products or powers of values that are not constant, which could run for hours.",
            where=f"{where}, line {unbounded[0].lineno} of the template".lstrip(", "),
            allowed=f"products with a number up to {_MAX_FACTOR:,}",
            next_step="Choose another template.",
        )


def _is_small(node: nodes.BinExpr) -> bool:
    sides = [node.left, node.right]
    fixed = [isinstance(side, nodes.Const) and _is_small_constant(side.value) for side in sides]
    return any(fixed) if isinstance(node, nodes.Mul) else all(fixed)


def _is_small_constant(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _MAX_FACTOR


def _has_base(node: nodes.Filter) -> bool:
    return len(node.args) > 1 or any(keyword.key == "base" for keyword in node.kwargs)


def clock(day: date) -> Callable[[str], str]:
    """Return a function `strftime_now`, as called by chat templates, that always uses midnight of the given day."""

    def strftime_now(form: Any) -> str:
        return datetime.combine(day, time()).strftime(str(form))

    return strftime_now


def parse_day(text: str, option: str) -> date:
    """Parse a date `YYYY-MM-DD` of the command line.

    Raises:
        ConfigError: the text has another format.
    """
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text} is not a date.", allowed="YYYY-MM-DD, such as 2024-07-26") from error
