"""Safe terminal output: escape sequences and markup in a text have no effect.

Prompts, labels, paths, log lines and model output may come from untrusted sources. A terminal executes the escape
sequences in them (OSC 52 writes to the clipboard, a bidirectional override changes the order of the words shown), and
rich would interpret `[/INST]` as markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from nemo_minitron.system.disclosure import masked

_COLORS = re.compile(r"\x1b\[[0-9;:]*m")
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and line feed; C1 codes act like ESC sequences
    "\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # text direction, or zero width
    "\ud800-\udfff\U000e0000-\U000e0fff]"  # surrogates; tags
)
_JOINERS = "\u200c\u200d"
"""Zero-width joiners that Persian words and combined emoji need; they neither move nor hide other characters."""


def visible(text: str) -> str:
    """Replace every control or invisible character of a text with an escape such as `\\x1b`.

    Line feeds and tabs are kept. Color codes, which are frequent in the logs of libraries, are removed.
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNSEEN.sub(_escape, _COLORS.sub("", text).replace("\r\n", "\n"))


def _escape(found: re.Match[str]) -> str:
    sign = found.group()
    return sign if sign in _JOINERS else sign.encode("unicode_escape", "surrogatepass").decode()


def write(text: str, *, end: str = "\n") -> None:
    """Print to stdout without rich, for output that programs parse and for streamed model output."""
    print(visible(text), end=end, flush=True)


class Screen(Console):
    """rich console for untrusted text: square brackets are not markup, and `:smile:` is not an emoji."""

    def __init__(
        self,
        *,
        stderr: bool = False,
        file: IO[str] | None = None,
        force_terminal: bool | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__(
            stderr=stderr,
            file=file,
            force_terminal=force_terminal,
            width=width,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def say(self, text: object, mark: str = "", style: str = "") -> None:
        """Print one line without wrapping it, optionally with a colored label in front.

        Args:
            mark: the label, e.g. `warning`.
            style: color of the label.
        """
        words = visible(masked(str(text)))
        self.print(Text.assemble((visible(mark), style), " " if mark and words else "", words), soft_wrap=True)

    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(visible(masked(text)), **options)  # type: ignore[arg-type]

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            # Control segments come from rich itself: cursor movements of a bar.
            yield Segment(text if control else visible(text), style, control)
