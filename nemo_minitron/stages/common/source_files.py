"""Files of the sources of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.data.found import FORMATS, find_files
from nemo_minitron.hf.source import resolve_path
from nemo_minitron.stages.context import StageContext


def files_of(source: str, ctx: StageContext, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Return the files of a source, and print remarks on the selection.

    Raises:
        DataError: as for `find_files`.
        EnvironmentProblem: the source is an asset that has not been fetched.
    """
    found = find_files(resolve_path(source, Path(ctx.execution.assets_dir)), formats)
    for remark in found.remarks():
        ctx.progress.say(f"{source}: {remark}")
    return found.files
