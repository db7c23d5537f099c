"""Rendering chat templates as `tokenizer.apply_chat_template` does, identically for all versions of transformers.

Some version after transformers 5.0 (at the latest 5.24) stopped passing functions to templates, so a fixed date
cannot be passed through `apply_chat_template`. That method also checks the version of Jinja before each text.
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
"""Number of compiled templates to keep."""


def render_chat(
    jinja: str,
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    *,
    day: date,
    add_generation_prompt: bool,
    **variables: Any,
) -> str:
    """Render the template with `variables` and the tokenizer's special tokens.

    Raises:
        TemplateError: the template refuses the messages or is invalid. A template can also raise any other error.
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
    """Renders the block {% generation %}, which marks an answer, as its content."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace without attributes that begin with an underscore, which would give access to Python."""

    def __init__(*args: Any, **attributes: Any) -> None:
        # As in Jinja, there is no parameter called `self`, so that `namespace(self=...)` is allowed.
        found = dict(*args[1:], **attributes)
        for name in found:
            _require_plain(name)
        Namespace.__init__(args[0], found)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


class _Dict:
    """Replaces the type `dict` in templates, without the attributes of the type."""

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
    # Jinja's own filter escapes < and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
