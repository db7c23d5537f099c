"""A training that a test kills: `python -m tests.support.aligner_child NEMO ROWS WORK`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.aligner import train, training_config

if __name__ == "__main__":
    nemo, rows, work = map(Path, sys.argv[1:])
    train("sft", training_config("sft", nemo, rows, work, num_steps=10), nemo, work)
