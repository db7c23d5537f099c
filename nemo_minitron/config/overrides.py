"""Conversion of overrides on the command line into Hydra's grammar.

Hydra interprets `~`, `#`, `=`, parentheses, commas and most non-ASCII letters as syntax. Here the schema decides: the
value of a key that holds text is taken literally. Other values are parsed by Hydra, or taken as text if its grammar
does not accept them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.config.keys import value_kind
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ConfigError

CLUSTER = "cluster"
SHORT = {"launcher": "execution.launcher", CLUSTER: "execution.cluster"}
"""Short forms of keys in overrides."""
_FORM = re.compile(r"(\+\+|\+|~)?([^=]*)=(.*)", re.DOTALL)
_DELETION = re.compile(r"~[A-Za-z_][\w./@:-]*")
KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_PLAIN_DICT_KEY = re.compile(r"[A-Za-z_][\w-]*|\d+")
_ESCAPED = re.compile(r'"[^"]*\\[^"]*"')
"""A text in double quotes with a backslash, which YAML decodes and Hydra does not."""
_EXAMPLE = "stages.distill.lr=1e-4"


class Override(NamedTuple):
    """An override KEY=VALUE."""

    prefix: str
    """`+`, `++` or empty, as in Hydra."""
    key: str
    """The full key, without short forms."""
    value: str


def require_form(recipe: Path, words: Sequence[str]) -> None:
    """Check that all words are overrides.

    Raises:
        ConfigError: a word is not an override; the message suggests a correction.
    """
    if not recipe.name:
        raise ConfigError("No recipe is given.", next_step="For example: recipes/toy/width.yaml")
    if "=" in str(recipe) and not recipe.is_file():
        later = next((word for word in words if Path(word).suffix in (".yaml", ".yml")), "RECIPE")
        raise ConfigError(
            f"{recipe} is in the place of the recipe.",
            next_step=f"Put the recipe first and overrides after it: minitron COMMAND {later} {recipe}",
        )
    for number, word in enumerate(words):
        found = _FORM.fullmatch(word)
        if found is None and _DELETION.fullmatch(word):
            continue
        if found is None or not found[2].strip():
            raise ConfigError(f"{word!r} is not an override.", next_step=_suggestion(number, words))
        if found[2] != found[2].strip():
            raise ConfigError(f"{word!r}: there is a space in the key.", next_step=f"Write KEY=VALUE: {_EXAMPLE}")


def _suggestion(number: int, words: Sequence[str]) -> str:
    word = words[number]
    before, after = words[number - 1] if number else "", words[number + 1] if number + 1 < len(words) else ""
    if word.startswith("=") or before.endswith("=") or after.startswith("="):
        return f"Remove the spaces around the =, as in {_EXAMPLE}; quote a value that has spaces."
    if word.startswith("-"):
        return "Everything after -- is an override; put options before it."
    if Path(word).suffix in (".yaml", ".yml"):
        return "Give one recipe, followed by overrides."
    if ":" in word and KEY.fullmatch(word.split(":", 1)[0]):
        key, value = word.split(":", 1)
        return f"Write {key}={value.strip()}"
    return f"Overrides are KEY=VALUE, such as {_EXAMPLE}; a value with spaces needs quotes."


def for_hydra(word: str) -> str:
    """Convert an override into Hydra's grammar. It may add keys to the recipe, because the schema rejects wrong ones.

    Raises:
        ConfigError: the value is a sweep over several values, or a list that is not closed.
    """
    found = _FORM.fullmatch(word)
    if word.startswith("~"):
        return f"~{_full_key(word[1:])}"
    if found is None:
        return word
    key = _full_key(found[2])
    if key.split(".")[0] not in Recipe.model_fields or "@" in key:
        return word
    if not KEY.fullmatch(key):
        raise ConfigError(f"{found[2]} is not a key.", next_step=f"Keys are names joined by dots, as in {_EXAMPLE}")
    override = Override(found[1] or "++", key, found[3])
    return f"{override.prefix}{key}={_value(override)}"


def _full_key(key: str) -> str:
    """Expand short forms, and replace `[0]` with `.0`."""
    first = re.split(r"[.\[]", key, maxsplit=1)[0]
    if first in SHORT:
        key = SHORT[first] + key[len(first) :]
    return re.sub(r"\[(\d+)\]", r".\1", key)


def _value(override: Override) -> str:
    from hydra.errors import HydraException

    kind, value = value_kind(override.key), override.value
    try:
        parsed = _parsed(value)
    except (HydraException, RecursionError):
        # A value outside Hydra's grammar may still be a list or a mapping in YAML.
        is_nested = kind != "text" and value.lstrip()[:1] in ("[", "{")
        return _nested(override) if is_nested else _quoted(value)
    if kind == "text":
        is_quoted = value.strip()[:1] in ("'", '"') and not parsed.is_sweep_override()
        if is_quoted:
            return _decoded(value)
        return value if value.strip().lower() == "null" else _quoted(value)
    if not parsed.is_sweep_override():
        return _nested_decoded(override) if value.lstrip()[:1] in ("[", "{") else value
    if kind == "unknown":
        return _quoted(value)
    raise ConfigError(
        f"{override.key} = {value}: several values for a key that holds one.",
        next_step=f"Write a list with brackets: {override.key}=[{value}]"
        if kind == "list"
        else "Start one run for each value, with a different name (name=...).",
    )


def _parsed(value: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(f"key={value}")


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _decoded(quoted: str) -> str:
    r"""Replace the escapes of a text in double quotes, such as "\f", as in a recipe; Hydra would keep them."""
    from yaml import YAMLError, safe_load

    if "\\" not in quoted or not quoted.lstrip().startswith('"'):
        return quoted
    try:
        text = safe_load(quoted)
    except YAMLError:
        return quoted
    return _quoted(text) if isinstance(text, str) else quoted


def _nested_decoded(override: Override) -> str:
    r"""Replace the escapes of texts in double quotes inside of a list or mapping, as `_decoded` does.

    A pattern such as "\d+" has an escape that YAML does not know; then all texts are kept as Hydra reads them.
    """
    if not _ESCAPED.search(override.value):
        return override.value
    try:
        return _nested(override)
    except ConfigError:
        return override.value


def _nested(override: Override) -> str:
    """Convert a list or mapping with texts that need quotes, such as [~/a.txt], into Hydra's grammar."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return _written(OmegaConf.to_container(OmegaConf.create(override.value), resolve=False))
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ConfigError(
            f"{override.key}: {override.value} is not a list or mapping: {''.join(first)}",
            next_step="Write [a, b] or {key: value}; quote texts with commas, colons or brackets.",
        ) from error


def _written(value: Any) -> str:
    if isinstance(value, dict):
        odd = [key for key in value if not _PLAIN_DICT_KEY.fullmatch(str(key))]
        if odd:
            raise ValueError(f"the key {odd[0]!r} is not a plain name")
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return "null" if value is None else str(value).lower()


def unknown_key(words: Sequence[str], groups: Sequence[str], stages: Sequence[str]) -> ConfigError | None:
    """Return an error for the first override whose key begins with an unknown name; None if all are known.

    Args:
        groups: names of the config groups.
        stages: names of the recipe's stages.
    """
    known = list(dict.fromkeys((*Recipe.model_fields, *SHORT, *groups, "hydra")))
    for word in words:
        found = _FORM.fullmatch(word)
        key = found[2] if found else word.lstrip("~")
        first = re.split(r"[./@:\[]", key, maxsplit=1)[0]
        if first in known:
            continue
        if first in stages:
            hint = f"Did you mean stages.{key}?"
        else:
            near = get_close_matches(first, [*known[:-1], *stages], n=1, cutoff=0.6)
            prefix = "stages." if near and near[0] in stages else ""
            hint = f"Did you mean {prefix}{near[0]}{key[len(first) :]}?" if near else ""
        return ConfigError(
            f"{key}: unknown key.{' ' + hint if hint else ''}",
            allowed=f"keys that begin with one of {', '.join(known[:-1])}",
            next_step="docs/reference/keys.md lists all keys with their defaults; `minitron schema --page` prints it.",
        )
    return None
