"""Tell a program of the user's that a stage has ended."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from typing import Literal

TIMEOUT_S = 60.0
logger = logging.getLogger(__name__)


def notify(
    command: Sequence[str],
    *,
    run: str,
    stage: str,
    status: Literal["finished", "failed", "stopped"],
    message: str = "",
) -> None:
    """Call the command, no shell between, with MINITRON_{RUN,STAGE,STATUS,MESSAGE} in its environment.

    Its failure is a warning in the log: it never ends a run.
    """
    if not command:
        return
    facts = {"RUN": run, "STAGE": stage, "STATUS": status, "MESSAGE": message}
    environment = {**os.environ, **{f"MINITRON_{key}": value.replace("\0", "") for key, value in facts.items()}}
    try:
        subprocess.run(
            list(command), env=environment, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=True, capture_output=True
        )
    except subprocess.CalledProcessError as error:
        # Not the words of the error itself: they hold the command, in which addresses and tokens stand.
        logger.warning("execution.notify_command did not work: it ended with code %d", error.returncode)
    except subprocess.TimeoutExpired:
        logger.warning("execution.notify_command did not work: it took longer than %.0f s", TIMEOUT_S)
    except OSError as error:
        logger.warning("execution.notify_command did not work: %s", error.strerror)
