"""Errors that users can fix. The CLI prints them without a traceback and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MAX_LINE_CHARS, MAX_LINES = 5000, 500
"""Limits of one part of a message. A path can have 4,096 characters, and a recipe can have many problems."""


def shortened(text: object, most: int = 300) -> str:
    """Shorten external text for use in a message by omitting the middle."""
    whole = str(text)
    if len(whole) <= most:
        return whole
    head, tail = most * 2 // 3, most // 4
    return f"{whole[:head]} [... {len(whole) - head - tail:,} characters ...] {whole[-tail:]}"


class MinitronError(Exception):
    """Problem that the user can fix.

    Args:
        what: the problem in one sentence, with the offending value.
        where: file, key or stage that contains it.
        allowed: accepted values.
        next_step: what the user should do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        allowed: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.what, self.where = _bounded(what) or "", _bounded(where)
        self.allowed, self.next_step = _bounded(allowed), _bounded(next_step)
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("allowed", self.allowed), ("next", self.next_step)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)

    def add(self, *, where: str | None = None, next_step: str | None = None) -> None:
        """Add what a caller knows: a location if there is none, and a further next step."""
        self.where = self.where or _bounded(where)
        self.next_step = _bounded(" ".join(text for text in (self.next_step, next_step) if text)) or None
        self.args = (self._text(),)

    def rename(self, old: str, new: str) -> None:
        """Replace `old` with `new` in the message, for example the temporary name of a folder with its final name."""
        for field in ("what", "where", "allowed", "next_step"):
            text = getattr(self, field)
            if text:
                setattr(self, field, text.replace(old, new))
        self.args = (self._text(),)


@contextmanager
def error_context(
    *types: type[MinitronError], where: str | None = None, next_step: str | None = None
) -> Iterator[None]:
    """Add to errors of these types what only the caller knows, such as the names of stages and keys of the recipe."""
    try:
        yield
    except types as error:
        error.add(where=where, next_step=next_step)
        raise


def _bounded(text: str | None) -> str | None:
    """Limit the length of one part of a message."""
    if text is None or len(text) <= MAX_LINE_CHARS:
        return text
    lines = text.split("\n")
    more = [f"[... {len(lines) - MAX_LINES:,} more lines]"] if len(lines) > MAX_LINES else []
    return "\n".join([*(shortened(line, MAX_LINE_CHARS) for line in lines[:MAX_LINES]), *more])


class ConfigError(MinitronError):
    """The recipe or an override is invalid."""


class PlanError(MinitronError):
    """The recipe is well-formed but cannot be executed (sizes, layouts, missing inputs)."""


class ArtifactError(MinitronError):
    """A stage's output is missing, damaged, changed or in use."""


class CheckpointError(MinitronError):
    """A model checkpoint cannot be read or written, or is not supported."""


class DataError(MinitronError):
    """Text data cannot be read or is unusable."""


class NumericsError(MinitronError):
    """A measured number violates an expectation (NaN, teacher loss above its bound, wrong size)."""


class DivergenceError(NumericsError):
    """The loss of a training is NaN or infinite, or stays above its bound."""


class EnvironmentProblem(MinitronError):
    """The machine lacks something: a package, disk space, permissions, an asset."""


class ProcessesDied(EnvironmentProblem):
    """Processes of a stage ended without reporting an error: killed, out of memory, or on a failed node."""


class Interrupted(MinitronError):
    """The run stopped because of a stop request. This is not a failure: the CLI exits with code 130."""
