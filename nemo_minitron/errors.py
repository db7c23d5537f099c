"""Errors that a user can cause. The CLI prints them without a traceback and exits with 2."""

from __future__ import annotations

MAX_LINE_CHARS, MAX_LINES = 5000, 500
"""Of a message. A path may have 4,096 characters; a recipe may have many problems."""


def shortened(text: object, most: int = 300) -> str:
    """Text from outside as it may stand in a message: the middle of a long one is left out."""
    whole = str(text)
    if len(whole) <= most:
        return whole
    head, tail = most * 2 // 3, most // 4
    return f"{whole[:head]} [... {len(whole) - head - tail:,} characters ...] {whole[-tail:]}"


class MinitronError(Exception):
    """A problem that the user can fix.

    Args:
        what: the problem, one sentence, with the offending value.
        where: file, key or stage in which it stands.
        allowed: what would have been accepted.
        next_step: what to do now.
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

    def rename(self, old: str, new: str) -> None:
        """Write `new` wherever the message says `old`: a folder that exists under that name only while it is made."""
        for field in ("what", "where", "allowed", "next_step"):
            text = getattr(self, field)
            if text:
                setattr(self, field, text.replace(old, new))
        self.args = (self._text(),)


def _bounded(text: str | None) -> str | None:
    """A part of a message that stays readable whatever was put into it."""
    if text is None or len(text) <= MAX_LINE_CHARS:
        return text
    lines = text.split("\n")
    more = [f"[... {len(lines) - MAX_LINES:,} more lines]"] if len(lines) > MAX_LINES else []
    return "\n".join([*(shortened(line, MAX_LINE_CHARS) for line in lines[:MAX_LINES]), *more])


class ConfigError(MinitronError):
    """The recipe or an override is wrong."""


class PlanError(MinitronError):
    """The recipe is well-formed but cannot be carried out (sizes, layouts, missing inputs)."""


class ArtifactError(MinitronError):
    """A stage's output is missing, damaged, changed or in use."""


class CheckpointError(MinitronError):
    """A model checkpoint cannot be read, written or understood."""


class DataError(MinitronError):
    """Text data cannot be read or is unusable."""


class NumericsError(MinitronError):
    """A measured number is not what the recipe promised (NaN, teacher above its bound, wrong size)."""


class EnvironmentProblem(MinitronError):
    """The machine lacks something: a package, disk space, permissions, an asset."""


class ProcessesDied(EnvironmentProblem):
    """Processes of a stage ended without a word: killed, out of memory, or on a node that was lost."""


class Interrupted(MinitronError):
    """The run stopped because it was asked to. Not a failure: the CLI exits with 130."""
