"""Chat templates are rendered here as `tokenizer.apply_chat_template` renders them, the same under all its versions.

From some version of transformers 5 on (5.24 does, 5.0 does not) a template is handed no function, so that it could not
be told the day; and it checks the version of Jinja before each text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from nemo_minitron.data.chat.purity import clock

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEMPLATES = 8
"""Compiled ones that are kept."""


def render_chat(
    jinja: str,
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    *,
    day: date,
    add_generation_prompt: bool,
    **variables: Any,
) -> str:
    """What the template writes; `variables` are seen by it, as are the special tokens.

    Raises:
        TemplateError: the template refuses the messages, or is not valid. Any other error may come from within it, too.
    """
    tokens = {name: str(token) for name in _NAMED if (token := getattr(tokenizer, name, None)) is not None}
    options: dict[str, Any] = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
    options |= {"add_generation_prompt": add_generation_prompt, "strftime_now": clock(day)}
    return _compiled(jinja).render({**tokens, **options, **variables})


@lru_cache(_TEMPLATES)
def _compiled(jinja: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "namespace": _Namespace, "dict": _Dict()}
    return environment.from_string(jinja)


class _Generation(Extension):
    """The block {% generation %}, which marks an answer: its content, as a block of its own."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace without names that lead to Python's own."""

    def __init__(*args: Any, **attributes: Any) -> None:
        # Jinja's signature: `namespace(self=...)` is a name like any other.
        found = dict(*args[1:], **attributes)
        for name in found:
            _require_plain(name)
        Namespace.__init__(args[0], found)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` without the attributes of the type."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _require_plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template sets an attribute {name!r}")


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own writes < and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
