"""`minitron doctor`: what this machine can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from nemo_minitron.cli.arguments import expanded
from nemo_minitron.cli.output import console
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.terminal import write

STYLES = {"ok": "green", "newer": "yellow", "missing": "yellow", "problem": "red"}


def doctor(
    run_root: Annotated[Path, typer.Option(callback=expanded, help="Folder where runs will be kept.")] = Path("runs"),
    require: Annotated[str, typer.Option(help="What must be available: gpu, aligner, slurm, pyxis, docker ...")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Examine this machine: GPUs, versions, NeMo-Aligner, Slurm, containers, disk. Exit with 2 on problems."""
    from nemo_minitron.doctor import examine, failures

    found = examine(run_root)
    wanted = [word.strip() for word in require.split(",") if word.strip()]
    unknown = sorted(set(wanted) - {one.group for one in found} - {"pyxis"})
    if unknown:
        groups = ", ".join(sorted({one.group for one in found}))
        raise EnvironmentProblem(f"--require does not know {', '.join(unknown)}.", allowed=groups)
    if as_json:
        write(json.dumps([asdict(one) for one in found], indent=2))
    else:
        table = Table()
        for column in ("what", "", "found", "next"):
            table.add_column(column)
        for one in found:
            step = one.next_step if one.level != "ok" else ""
            table.add_row(one.what, Text(one.level, style=STYLES[one.level]), Text(one.text), Text(step))
        console.print(table)
    wrong = failures(found, wanted)
    absent = [group for group in wanted if group not in {one.group for one in found}]
    if wrong or absent:
        names = ", ".join([*(one.what for one in wrong), *absent])
        raise EnvironmentProblem(f"This machine lacks: {names}.", next_step="See the last column of the table.")
