"""Redirection of the log output of libraries while a stage runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemo_minitron.artifacts.run_paths import LOGS, RunPaths
from nemo_minitron.system.disclosure import MaskingFormatter
from nemo_minitron.system.safe_files import open_log, own_folder


def log_handler(log: IO[str]) -> logging.Handler:
    """Return a handler that writes log records without secrets."""
    handler = logging.StreamHandler(log)
    # On a full disk, the stage reports the error once; ignore it for every line of the log.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    handler.setFormatter(MaskingFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    return handler


@contextmanager
def log_file(root: Path, stage: str) -> Iterator[None]:
    """Redirect log output and warnings of libraries from the terminal to logs/<stage>.log."""
    own_folder(root, LOGS)
    log = open_log(RunPaths(root).log(stage))
    handler = log_handler(log)
    top = logging.getLogger()
    before = list(top.handlers)
    top.handlers[:] = [handler]
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.captureWarnings(False)
        top.handlers[:] = before
        handler.close()
        log.close()
