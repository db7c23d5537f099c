"""Masking of secrets: decides what reports, model cards, manifests, locks, logs and bundles may contain.

Reports, exported models and bundles are shared, and run folders are often readable by others. Therefore they contain no
values of environment variables, no command-line values and no host names. The few files that need such values
(`plan.json`, the files that `minitron launch` writes for its jobs, a worker's task) are written by `write_private`, so
that only their owner can read them.
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
"""Minimum length of a secret, in characters. Masking shorter values would also mask common words."""
PUBLIC_EXECUTION = (
    "device",
    "threads",
    "workers",
    "async_checkpoints",
    "peak_tflops",
    "parallel",
    "parallel_by_stage",
    "server_nodes_by_stage",
    "launcher",
    "planning",
)
"""Keys of `execution` that reports show. The others contain folders, sites, accounts, commands and variables."""
PRIVATE_KEYS = ("execution.cluster.environment", "execution.notify_command")
"""Recipe keys whose values are never shown."""
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|WEBHOOK|COOKIE|BEARER|SIGNATURE|(API|ACCESS|PRIVATE)_?KEY"
    r"|(^|_)(KEY|PWD|PASS|AUTH|DSN)(_|$)|_PROXY$",
    re.IGNORECASE,
)
_NAMES_A_PLACE = re.compile(r"(_(DIR|FILE|PATH|SOCK|HOME)|^PWD|^OLDPWD|^NO_PROXY)$", re.IGNORECASE)
_ONLY_NAMED = re.compile(r"\$\{oc\.env:\w+\}")
_IN_ADDRESS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")


def looks_secret(name: str) -> bool:
    """Return whether a variable or key of this name probably contains a secret."""
    return bool(_SECRET_NAME.search(name)) and not _NAMES_A_PLACE.search(name)


def secrets_in(environment: Mapping[str, str]) -> list[str]:
    """List the values that must be masked, longest first, including their Python and JSON escaped forms."""
    found = {value for name, value in environment.items() if looks_secret(name) and len(value) >= SHORTEST}
    lines = {line for value in found for line in value.splitlines() if len(line) >= SHORTEST}
    quoted = {write(value)[1:-1] for value in found for write in (repr, json.dumps)}
    return sorted(found | lines | quoted, key=len, reverse=True)


def masked(text: str, *others: Mapping[str, str]) -> str:
    """Mask passwords in URLs and the secrets of this process's environment in a text.

    Args:
        others: more environments whose secrets are masked, such as that of a recipe's jobs.
    """
    for value in sorted({value for some in (os.environ, *others) for value in secrets_in(some)}, key=len, reverse=True):
        if value in text:
            text = text.replace(value, MASK)
    return _IN_ADDRESS.sub(rf"\g<1>{MASK}@", text) if "://" in text else text


def masked_values(facts: Any, *others: Mapping[str, str]) -> Any:
    """Apply `masked` to every string in nested dicts and lists."""
    if isinstance(facts, str):
        return masked(facts, *others)
    if isinstance(facts, Mapping):
        return {masked_values(key, *others): masked_values(value, *others) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [masked_values(value, *others) for value in facts]
    return facts


def masked_log(lines: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Mask lines of a log before they are shown.

    Slurm writes the output of modules and programs of the site without masking.

    Args:
        environment: the recipe's `execution.cluster.environment`, which jobs have in addition to this environment.
    """
    return masked("\n".join(lines), environment).splitlines()


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a resolved recipe that reports may show, with secrets masked."""
    if not recipe:
        return {}
    execution = recipe.get("execution", {})
    shown = {key: value for key, value in execution.items() if key in PUBLIC_EXECUTION}
    secrets = environment_of(recipe)
    found: dict[str, Any] = masked_values({**recipe, "execution": shown}, secrets)
    return found


def portable_recipe(written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source form of a recipe for use on another machine, without the values of `PRIVATE_KEYS`.

    References such as `${oc.env:NAME}` are kept because they contain no value.
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
    """Return `execution.cluster.environment` of a resolved recipe."""
    cluster = (recipe.get("execution") or {}).get("cluster") or {}
    return dict(cluster.get("environment") or {})


def is_private_key(key: str) -> bool:
    """Return whether messages must omit the value of this recipe key because it contains values of `PRIVATE_KEYS`."""
    return any(
        key == private or key.startswith(f"{private}.") or private.startswith(f"{key}.") for private in PRIVATE_KEYS
    )


def masked_command(argv: Sequence[str]) -> list[str]:
    """Mask the values in a command line: `minitron run width.yaml stages.distill.lr=***`."""
    return [_masked_argument(word, is_first=not number) for number, word in enumerate(argv)]


def _masked_argument(word: str, *, is_first: bool) -> str:
    key, sign, _ = word.partition("=")
    if sign and not is_first:
        return f"{key}={MASK}"
    return masked(Path(word).name if Path(word).is_absolute() else word)


class MaskingFormatter(logging.Formatter):
    """Log formatter that masks the secrets of the environment."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def environment_script(environment: Mapping[str, str]) -> str:
    """Return a shell script that exports variables. Jobs source it to keep the values out of scripts and commands."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())


def write_private(file: Path, text: str) -> None:
    """Replace a file atomically with one that only its owner can read."""
    write_whole(file, text, private=True)
