"""Notification of a user's program when a stage has ended."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from typing import Literal

from nemo_minitron.system.outer_job import SCRIPT_NAMES

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
    """Run the command without a shell, with MINITRON_{RUN,STAGE,STATUS,MESSAGE} in its environment.

    A failure of the command is logged as a warning and never ends the run.
    """
    if not command:
        return
    facts = {"RUN": run, "STAGE": stage, "STATUS": status, "MESSAGE": message}
    # The program may start another run, which has other nodes and files than this job.
    own = {name: value for name, value in os.environ.items() if name not in SCRIPT_NAMES}
    environment = {**own, **{f"MINITRON_{key}": value.replace("\0", "") for key, value in facts.items()}}
    try:
        subprocess.run(
            list(command), env=environment, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=True, capture_output=True
        )
    except subprocess.CalledProcessError as error:
        # The text of the error contains the command, which may contain addresses and tokens.
        logger.warning("execution.notify_command failed with exit code %d", error.returncode)
    except subprocess.TimeoutExpired:
        logger.warning("execution.notify_command failed: it took longer than %.0f s", TIMEOUT_S)
    except OSError as error:
        logger.warning("execution.notify_command failed: %s", error.strerror)
