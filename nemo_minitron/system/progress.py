"""Progress of long operations: a bar on a terminal, lines in a log, and a small JSON file for `minitron status`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from nemo_minitron.system.duration import duration
from nemo_minitron.system.files import write_whole
from nemo_minitron.system.terminal import Screen, visible

T = TypeVar("T")
LOG_INTERVAL_S = 15.0
"""Minimum interval between progress lines without a terminal, and between writes of the status file."""


@dataclass
class Bar:
    """Progress of one operation; `advance` also takes values to show next to the bar (loss=2.31, lr=1e-4)."""

    description: str
    total: int
    unit: str
    progress: Progress
    done: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)
    first_done: int = 0

    def advance(self, n: int = 1, **fields: object) -> None:
        self.done += n
        self.fields.update({key: _show(value) for key, value in fields.items()})
        self.progress.update(self)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds left, from the speed since this bar was created; None before the first step."""
        fresh = self.done - self.first_done
        return self.elapsed_s / fresh * (self.total - self.done) if fresh > 0 else None


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Progress:
    """Progress bars and messages of one process.

    Args:
        status_file: file with the current progress, which `minitron status` reads; None: no file.
        silent: show nothing and write no file, for ranks other than the first and for tests.
    """

    def __init__(self, status_file: Path | None = None, *, silent: bool = False) -> None:
        self.status_file, self.silent = status_file, silent
        # Keep this stream: sys.stderr is redirected to silence libraries while bars are shown.
        self.stream = sys.stderr
        self.console = Screen(file=self.stream)
        self._rich: RichProgress | None = None
        self._task: int | None = None
        self._last_line_s = 0.0

    @contextmanager
    def bar(self, description: str, total: int, unit: str = "it", *, done: int = 0) -> Iterator[Bar]:
        """Show a bar over `total` units. A resumed run starts with `done` finished units."""
        bar = Bar(description, total, unit, self, done=done, first_done=done)
        if self.silent:
            yield bar
            return
        if self.console.is_terminal:
            with _rich_bar(self.console) as self._rich:
                self._task = self._rich.add_task(visible(description), total=total, completed=done, info="")
                try:
                    yield bar
                finally:
                    self._rich = None
        else:
            self._line(bar)
            yield bar
            self._line(bar)

    def track(self, items: Iterable[T], description: str, total: int, unit: str = "it") -> Iterator[T]:
        """Iterate over items and show a bar."""
        with self.bar(description, total, unit) as bar:
            for item in items:
                yield item
                bar.advance()

    def say(self, text: str, mark: str = "", style: str = "") -> None:
        """Print one line, optionally with a colored label in front.

        Args:
            mark: the label, e.g. `warning`.
            style: color of the label.
        """
        if not self.silent:
            self.console.say(text, mark, style)

    def warn(self, text: str) -> None:
        """Print one line with the label `warning`."""
        self.say(text, "warning", "yellow")

    def update(self, bar: Bar) -> None:
        if self.silent:
            return
        info = " ".join(f"{key} {value}" for key, value in bar.fields.items())
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=bar.done, info=info)  # type: ignore[arg-type]
        if time.monotonic() - self._last_line_s >= LOG_INTERVAL_S:
            self._last_line_s = time.monotonic()
            self._write_status(bar)
            if self._rich is None:
                self._line(bar)

    def _line(self, bar: Bar) -> None:
        info = " ".join(f"{key} {value}" for key, value in bar.fields.items())
        eta = f" eta {duration(bar.eta_s)}" if bar.eta_s is not None and bar.done < bar.total else ""
        line = visible(f"{bar.description} {bar.done}/{bar.total} {bar.unit} {info}{eta}").rstrip()
        print(line, file=self.stream, flush=True)

    def _write_status(self, bar: Bar) -> None:
        if self.status_file is None:
            return
        payload = {"description": bar.description, "done": bar.done, "total": bar.total, "unit": bar.unit}
        payload |= {"eta_s": bar.eta_s, "fields": bar.fields, "time": time.time()}
        write_whole(self.status_file, json.dumps(payload))


def _rich_bar(console: Screen) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
