"""`minitron convert`: a model between Hugging Face and NeMo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.arguments import expanded
from nemo_minitron.cli.output import console


def convert(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder, or a NeMo checkpoint (folder or .nemo).")],
    out: Annotated[Path, typer.Argument(help="A new folder, or a new file with the suffix .nemo.")],
    like: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, help="From NeMo: the Hugging Face folder whose config and tokenizer are written."
        ),
    ] = None,
) -> None:
    """Convert a model between Hugging Face and NeMo, bit for bit; pruned shapes and Llama 3.1 included."""
    from nemo_minitron.backends.alignment.nemo_aligner import nemo_file
    from nemo_minitron.system.interrupts import StopRequest
    from nemo_minitron.system.progress import Progress

    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".convert-") as work:
        if like is None:
            nemo_file.from_hugging_face(model, out, Path(work), Progress(), StopRequest())
        else:
            nemo_file.to_hugging_face(model, like, out, Path(work), Progress(), StopRequest())
    console.say(out, "written", "green")
