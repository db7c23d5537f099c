"""What may leave: the one place that decides what stands in reports, cards, manifests, locks, logs and bundles.

Reports, exported models and bundles are passed on, and runs lie in shared folders. So values of environment variables,
words of commands and host names stay out of them. The few files that must hold such values (`plan.json`, what
`minitron launch` hands to its jobs, a worker's orders) are written by `write_private`, for their owner alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.system.safe_files import write_whole

MASK = "***"
SHORTEST = 6
"""Shorter values are no secrets, and hiding them would hide common words."""
PUBLIC_EXECUTION = (
    "device",
    "threads",
    "workers",
    "async_checkpoints",
    "peak_tflops",
    "parallel",
    "parallel_by_stage",
    "launcher",
    "planning",
)
"""Keys of `execution` that pages show. The others name folders, sites, accounts, commands and variables."""
PRIVATE_KEYS = ("execution.cluster.environment", "execution.notify_command")
"""Their values are shown nowhere."""
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|WEBHOOK|COOKIE|BEARER|SIGNATURE|(API|ACCESS|PRIVATE)_?KEY"
    r"|(^|_)(KEY|PWD|PASS|AUTH|DSN)(_|$)|_PROXY$",
    re.IGNORECASE,
)
_NAMES_A_PLACE = re.compile(r"(_(DIR|FILE|PATH|SOCK|HOME)|^PWD|^OLDPWD|^NO_PROXY)$", re.IGNORECASE)
_ONLY_NAMED = re.compile(r"\$\{oc\.env:\w+\}")
_IN_ADDRESS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")


def looks_secret(name: str) -> bool:
    """Whether a variable or a key of this name holds something that nobody else should read."""
    return bool(_SECRET_NAME.search(name)) and not _NAMES_A_PLACE.search(name)


def secrets_in(environment: Mapping[str, str]) -> list[str]:
    """The values that must not be shown, the longest first, also as Python and JSON write them."""
    found = {value for name, value in environment.items() if looks_secret(name) and len(value) >= SHORTEST}
    lines = {line for value in found for line in value.splitlines() if len(line) >= SHORTEST}
    quoted = {write(value)[1:-1] for value in found for write in (repr, json.dumps)}
    return sorted(found | lines | quoted, key=len, reverse=True)


def masked(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without the secrets of the environment, and without passwords in addresses."""
    for value in secrets_in(environment):
        if value in text:
            text = text.replace(value, MASK)
    return _IN_ADDRESS.sub(rf"\g<1>{MASK}@", text) if "://" in text else text


def masked_values(facts: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Facts for a page, with `masked` applied to every text in them."""
    if isinstance(facts, str):
        return masked(facts, environment)
    if isinstance(facts, Mapping):
        return {masked_values(key, environment): masked_values(value, environment) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [masked_values(value, environment) for value in facts]
    return facts


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe as pages may show it."""
    if not recipe:
        return {}
    execution = recipe.get("execution", {})
    shown = {key: value for key, value in execution.items() if key in PUBLIC_EXECUTION}
    secrets = environment_of(recipe)
    found: dict[str, Any] = masked_values(masked_values({**recipe, "execution": shown}), secrets)
    return found


def portable_recipe(written: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it was written, for another machine: without the values of `PRIVATE_KEYS`.

    `${oc.env:NAME}` stays: it holds no value.
    """
    execution = written.get("execution")
    if not isinstance(execution, Mapping):
        return dict(written)
    kept = {key: value for key, value in execution.items() if key != "notify_command"}
    cluster = kept.get("cluster")
    if isinstance(cluster, Mapping) and isinstance(cluster.get("environment"), Mapping):
        named = {key: value for key, value in cluster["environment"].items() if _ONLY_NAMED.fullmatch(str(value))}
        kept["cluster"] = {**cluster, "environment": named}
    return {**written, "execution": kept}


def environment_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """`execution.cluster.environment` of a resolved recipe."""
    cluster = (recipe.get("execution") or {}).get("cluster") or {}
    return dict(cluster.get("environment") or {})


def is_private_key(key: str) -> bool:
    """Whether messages leave out the value of this key of a recipe, as it holds values of `PRIVATE_KEYS`."""
    return any(
        key == private or key.startswith(f"{private}.") or private.startswith(f"{key}.") for private in PRIVATE_KEYS
    )


def told_command(argv: Sequence[str]) -> list[str]:
    """How a program was called, without the values in it: `minitron run width.yaml stages.distill.lr=***`."""
    return [_told(word, is_first=not number) for number, word in enumerate(argv)]


def _told(word: str, *, is_first: bool) -> str:
    key, sign, _ = word.partition("=")
    if sign and not is_first:
        return f"{key}={MASK}"
    return masked(Path(word).name if Path(word).is_absolute() else word)


class MaskingFormatter(logging.Formatter):
    """Lines of a log without the secrets of the environment."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def environment_script(environment: Mapping[str, str]) -> str:
    """A shell file that sets variables. Jobs source it, so that no value stands in a script or on a command line."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())


def write_private(file: Path, text: str) -> None:
    """Replace a file by one that only its owner can read; readers find the old text or the new one."""
    write_whole(file, text, private=True)
