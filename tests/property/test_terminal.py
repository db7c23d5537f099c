"""Any text of a prompt, a label, a path or a log is shown, and the terminal executes no part of it."""

from __future__ import annotations

import re
import unicodedata
from io import StringIO

from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from nemo_minitron.report.text import code, plain
from nemo_minitron.system.progress import Progress
from nemo_minitron.system.terminal import Screen, visible
from tests.support.examples import budget

PIECES = [
    "[/red]",
    "[/INST]",
    "[b]",
    ":smile:",
    "\x1b]52;c;eA==\x07",
    "\x1b[2J",
    "\x9b2J",
    "\u202e",
    "\r",
    "\x00",
    "\\[",
]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(st.characters(), max_size=8)), max_size=8).map("".join)
COLOR = re.compile(r"\x1b\[[0-9;]*m")
BIDIRECTIONAL = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


def _require_harmless(text: str) -> None:
    for sign in text:
        if sign not in "\n\t":
            assert unicodedata.category(sign) not in ("Cc", "Cs", "Zl", "Zp"), ascii(sign)
            assert unicodedata.bidirectional(sign) not in BIDIRECTIONAL, ascii(sign)


@given(TEXT, TEXT, st.booleans())
@budget(40)
def test_any_text_is_shown_and_none_is_obeyed(text: str, other: str, is_terminal: bool) -> None:
    screen = Screen(file=StringIO(), force_terminal=is_terminal, width=80)
    screen.say(text, other, "red")
    table = Table(title=text)
    table.add_column(other)
    table.add_row(text)
    screen.print(table)
    screen.print(text, soft_wrap=True)
    screen.rule(text)
    progress = Progress()
    progress.stream = StringIO()
    progress.console = screen
    with progress.bar(text, 2, other) as bar:
        bar.advance(1, **{"loss": text})
    progress.warn(text)
    assert isinstance(screen.file, StringIO)
    written = screen.file.getvalue() + progress.stream.getvalue()
    # Control sequences of rich itself: colors, and the cursor of a bar.
    own = re.sub(r"\x1b\[(\?25[lh]|[0-9]*[AKGJ])|\r", "", COLOR.sub("", written)) if is_terminal else written
    _require_harmless(own)


@given(TEXT)
@budget(40)
def test_what_is_visible_stays_as_it_is(text: str) -> None:
    once = visible(text)
    assert visible(once) == once
    _require_harmless(once)


@given(TEXT)
@budget(40)
def test_markdown_shows_any_text_on_one_line_without_markup(text: str) -> None:
    shown = plain(text)
    assert "\n" not in shown
    _require_harmless(shown)
    assert not re.search(r"(?<!\\)(\\\\)*[<>\[\]`*]", shown)
    assert "`" not in code(text)[1:-1]
