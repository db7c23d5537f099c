"""The one way by which text reaches a terminal: nothing in it is markup, and nothing in it is a command.

Prompts, labels, paths, log lines and answers of a model come from other people. A terminal carries out what it finds in
them (OSC 52 writes the clipboard, a bidirectional override shows other words than there are), and rich takes
`[/INST]` for markup.
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
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed; C1 is ESC in one byte
    "\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # order of writing, or no width
    "\ud800-\udfff\U000e0000-\U000e0fff]"  # half characters; tags
)
_JOINERS = "\u200c\u200d"
"""Persian words and joined emoji need them; they neither move nor hide anything."""


def visible(text: str) -> str:
    """The text with every character that a terminal would obey, or not show, written as an escape such as `\\x1b`.

    Line feeds and tabs stay. Colors, which logs of libraries are full of, are left out.
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNSEEN.sub(_escape, _COLORS.sub("", text).replace("\r\n", "\n"))


def _escape(found: re.Match[str]) -> str:
    sign = found.group()
    return sign if sign in _JOINERS else sign.encode("unicode_escape", "surrogatepass").decode()


def write(text: str, *, end: str = "\n") -> None:
    """To stdout, as it comes: for programs that read it, and for answers that are still being written."""
    print(visible(text), end=end, flush=True)


class Screen(Console):
    """rich's console for text from anywhere: square brackets are square brackets, `:smile:` is no picture."""

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
        """A line, however long, with a colored word before it.

        Args:
            mark: the word, e.g. `warning`.
            style: its color.
        """
        words = visible(masked(str(text)))
        self.print(Text.assemble((visible(mark), style), " " if mark and words else "", words), soft_wrap=True)

    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(visible(masked(text)), **options)  # type: ignore[arg-type]

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            # Control segments are rich's own: the cursor of a bar.
            yield Segment(text if control else visible(text), style, control)
