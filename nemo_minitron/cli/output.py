"""Output that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nemo_minitron.system.terminal import Screen

STATUS_STYLES = {"finished": "green", "changed": "yellow", "to run": "cyan"}
console = Screen()


def print_warnings(warnings: Iterable[str]) -> None:
    """Print each warning on a line."""
    for text in warnings:
        console.say(text, "warning", "yellow")


def print_report_path(file: Path) -> None:
    """Print where the report is, if the run has one."""
    if file.is_file():
        console.say(f"report: {file.resolve()}")
