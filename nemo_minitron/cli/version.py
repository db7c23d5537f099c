"""`minitron version`: print the version."""

from __future__ import annotations

from nemo_minitron import __version__
from nemo_minitron.system.terminal import write


def version() -> None:
    """Print the version."""
    write(__version__)
